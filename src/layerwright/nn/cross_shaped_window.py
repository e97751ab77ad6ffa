"""Attention inside windows of a map: half of the heads in vertical stripes, half in horizontal ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from layerwright.core.errors import InputError

__all__ = ["CrossShapedWindowAttention", "LePE", "window_attention"]


class LePE(nn.Module):
    """Locally-enhanced positional encoding: a depth-wise convolution of the values, added to what attention gives.

    ``attention(q, k, v) + DWConv(v)``. Zeros beyond the rim of a window tell a position how near the rim is, and the
    kernel tells neighbours apart, at any resolution.

    Source: Dong et al. (2022, arXiv 2107.00652).

    Args:
        dim: channels.
        kernel_size: odd.

    Raises:
        InputError: a number below 1, or an even kernel.
    """

    def __init__(self, dim: int, kernel_size: int = 3) -> None:
        super().__init__()
        if dim < 1:
            raise InputError(f"dim: got {dim}, expected at least 1")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise InputError(f"kernel_size: got {kernel_size}, expected an odd number, so that maps keep their size")
        self.conv = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)

    def forward(self, values: Tensor) -> Tensor:
        """Windows ``(windows, dim, height, width)`` to the same; nothing leaks from one window into another."""
        encoded: Tensor = self.conv(values)
        return encoded


def window_attention(
    qkv: Tensor,
    num_heads: int,
    window: tuple[int, int],
    lepe: nn.Module | None = None,
    *,
    mask_padding: bool = True,
    dropout: float = 0.0,
) -> Tensor:
    """Softmax attention inside the windows that tile a map: ``softmax(q k^T / sqrt(d)) v + lepe(v)``.

    A map that the windows do not tile is padded with zeros on both sides, as in the authors' code for segmentation.

    Args:
        qkv: queries, keys and values ``(batch, height, width, 3, dim)``.
        num_heads: divides `dim`.
        window: rows and columns of a window.
        lepe: from values ``(windows, dim, rows, columns)`` to what is added to the attention's output.
        mask_padding: padded positions get no attention, and a window larger than the map shrinks to it. Otherwise their
            zero keys take part, as in the authors' code for segmentation.
        dropout: probability with which an attention weight is left out.

    Returns:
        ``(batch, height, width, dim)``.

    Raises:
        InputError: another shape, heads that do not divide `dim`, or a window without positions.
    """
    if qkv.dim() != 5 or qkv.shape[3] != 3 or not qkv.numel():
        raise InputError(f"qkv: got shape {tuple(qkv.shape)}, expected (batch, height, width, 3, dim), none empty")
    batch, height, width, _, dim = qkv.shape
    if num_heads < 1 or dim % num_heads:
        raise InputError(f"num_heads: got {num_heads}, expected a divisor of the {dim} channels")
    if min(window) < 1:
        raise InputError(f"window: got {window}, expected at least one row and one column")
    rows, columns = (min(window[0], height), min(window[1], width)) if mask_padding else window
    below, right = -height % rows, -width % columns
    rim = (right // 2, right - right // 2, below // 2, below - below // 2)
    mask = None
    if below or right:
        qkv = functional.pad(qkv, (0, 0, 0, 0, *rim))
        if mask_padding:
            valid = functional.pad(qkv.new_ones(height, width, dtype=torch.bool), rim)
            mask = _tiles(valid[None, ..., None, None], rows, columns)[0].flatten(1).repeat(batch, 1)[:, None, None]
    tiles = _tiles(qkv, rows, columns)
    query, key, value = tiles.flatten(2, 3).unflatten(-1, (num_heads, dim // num_heads)).transpose(2, 3)
    mixed = functional.scaled_dot_product_attention(query, key, value, mask, dropout)
    mixed = mixed.transpose(1, 2).reshape(-1, rows, columns, dim)
    if lepe is not None:
        mixed = mixed + lepe(tiles[2].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    across = (width + right) // columns
    mixed = mixed.view(batch, -1, across, rows, columns, dim).transpose(2, 3)
    mixed = mixed.reshape(batch, height + below, width + right, dim)
    return mixed[:, rim[2] : rim[2] + height, rim[0] : rim[0] + width]


def _tiles(x: Tensor, rows: int, columns: int) -> Tensor:
    """``(batch, height, width, parts, dim)`` cut to ``(parts, windows, rows, columns, dim)`` with at most one copy."""
    batch, height, width, parts, dim = x.shape
    cut = x.view(batch, height // rows, rows, width // columns, columns, parts, dim)
    return cut.permute(5, 0, 1, 3, 2, 4, 6).reshape(parts, -1, rows, columns, dim)


class CrossShapedWindowAttention(nn.Module):
    """Self-attention of a map that reaches along stripes: every position sees a cross, after two layers the whole map.

    Queries, keys and values are split in halves along the channels. The first half of the heads attends inside vertical
    stripes of `stripe_width` columns, the second inside horizontal stripes of `stripe_width` rows, side by side, each with
    a `LePE` of its own; a linear layer joins them. ``H W C (4 C + s H + s W)`` multiply-adds for a stripe width `s`, and
    ``9 H W C`` for the encodings.

    With stripes as wide as the map this is full attention, the same as `full_window`.

    Source: Dong et al., "CSWin Transformer: A General Vision Transformer Backbone with Cross-Shaped Windows" (2022,
    arXiv 2107.00652).

    Args:
        dim: channels.
        num_heads: divides `dim`; even, unless `full_window`.
        stripe_width: at least 1.
        full_window: one branch in which all heads see the whole map, as in the last stage of the published networks.
        qkv_bias: biases of queries, keys and values.
        attn_drop: dropout of attention weights.
        proj_drop: dropout of the output.
        mask_padding: see `window_attention`.

    Raises:
        InputError: a number outside its range.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        stripe_width: int,
        full_window: bool = False,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        mask_padding: bool = True,
    ) -> None:
        super().__init__()
        if num_heads < 1 or (num_heads % 2 and not full_window):
            raise InputError(
                f"num_heads: got {num_heads}, expected an even number, half of them for each direction; with "
                "full_window=True any number will do"
            )
        if dim < 1 or dim % num_heads:
            raise InputError(f"dim: got {dim}, expected a multiple of the {num_heads} heads")
        if stripe_width < 1:
            raise InputError(f"stripe_width: got {stripe_width}, expected at least 1")
        for name, rate in (("attn_drop", attn_drop), ("proj_drop", proj_drop)):
            if not 0 <= rate < 1:
                raise InputError(f"{name}: got {rate}, expected a probability in [0, 1)")
        self.dim, self.num_heads, self.stripe_width = dim, num_heads, stripe_width
        self.full_window, self.attn_drop, self.mask_padding = full_window, attn_drop, mask_padding
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=qkv_bias), nn.Linear(dim, dim)
        self.lepe = nn.ModuleList([LePE(dim)] if full_window else [LePE(dim // 2), LePE(dim // 2)])
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """Channels last, ``(batch, height, width, dim)``, to the same.

        Raises:
            InputError: another shape, or a map without positions.
            TypeError: whole numbers.
        """
        if not x.is_floating_point():
            raise TypeError(f"x: got {x.dtype}, expected floating-point numbers")
        if x.dim() != 4 or x.shape[3] != self.dim or not x.numel():
            raise InputError(f"x: got shape {tuple(x.shape)}, expected (batch, height, width, {self.dim}), none empty")
        height, width = x.shape[1:3]
        qkv = self.qkv(x).unflatten(-1, (3, self.dim))
        windows = [(height, width)] if self.full_window else [(height, self.stripe_width), (self.stripe_width, width)]
        mixed = [
            window_attention(
                part, self.num_heads // len(windows), window, lepe, mask_padding=self.mask_padding,
                dropout=self.attn_drop if self.training else 0.0,
            )
            for part, window, lepe in zip(qkv.chunk(len(windows), -1), windows, self.lepe, strict=True)
        ]  # fmt: skip
        out: Tensor = self.proj_drop(self.proj(torch.cat(mixed, -1)))
        return out

    def extra_repr(self) -> str:
        """What `print` shows."""
        reach = "full_window=True" if self.full_window else f"stripe_width={self.stripe_width}"
        return f"{self.dim}, num_heads={self.num_heads}, {reach}"
