"""Attention over the patches of a picture whose heads know the offset of what they look at."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from layerwright.core.errors import InputError, unknown_name
from layerwright.nn.patches import Grid, grid_of

__all__ = ["RelPosPatchAttention", "ShiftedPatchProducts"]

Border = Literal["zero_token", "null_token", "circular", "interior"]
Encoding = Literal["relative_bias", "quadratic"]
_BORDERS = ("zero_token", "null_token", "circular", "interior")
_ENCODINGS = ("relative_bias", "quadratic")


class RelPosPatchAttention(nn.Module):
    """``out = sum_h softmax(q_t k_s / sqrt(key_dim) + b_h(s - t)) V_h``: heads with a bias for each offset of patches.

    With content left out, or queries at zero, what a head looks at depends on the offset alone; where its bias has one
    high peak, the head copies the patch at that offset. Values have no bias, so that what stands outside is zero.

    Source: Li et al., "Can Vision Transformers Perform Convolution?" (2021, arXiv 2111.01353); the quadratic form:
    Cordonnier et al., "On the Relationship between Self-Attention and Convolutional Layers" (2020, arXiv 1911.03584).

    Args:
        dim_in, dim_out: features of a token before and behind.
        num_heads: at least 1.
        head_dim: features of a head, or one number for each head. Unequal heads hold no more weights than they need;
            in the product they are padded to the widest.
        radius: offsets up to it, along both axes, have an entry of their own in the bias table; all others share one.
        grid: ``(rows, columns)`` of the patches, if no call says otherwise; the square of as many if left out.
        content: whether queries and keys of the tokens take part.
        key_dim: features of queries and keys; as many as the widest head has if left out.
        border: what a head sees outside: `radius` rings of ``zero_token``; one ``null_token`` for each offset of the
            table that leads outside; the other side of the picture (``circular``, at least ``2 radius + 1`` patches along
            both axes); or nothing (``interior``: heads that look outside spread over all patches).
        encoding: a table, or ``quadratic``: ``b_h(offset) = -sharpness_h |offset - centre_h|^2``, which queries and
            keys of absolute positions can express too.
        bias: of the output.
        generator: of the first weights (normal, 0.02).

    Raises:
        InputError: sizes below 1, or settings that do not go together.
    """

    bias_table: Tensor | None

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        num_heads: int,
        head_dim: int | Sequence[int],
        *,
        radius: int = 1,
        grid: Grid | None = None,
        content: bool = True,
        key_dim: int | None = None,
        border: Border = "zero_token",
        encoding: Encoding = "relative_bias",
        bias: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        widths = (head_dim,) * num_heads if isinstance(head_dim, int) else tuple(head_dim)
        _check(dim_in, dim_out, num_heads, widths, radius, border, encoding)
        self.dim_in, self.dim_out, self.num_heads, self.head_dims = dim_in, dim_out, num_heads, widths
        self.radius, self.grid, self.border, self.encoding = radius, grid, border, encoding
        self.key_dim = max(widths) if key_dim is None else key_dim
        self.query = nn.Linear(dim_in, num_heads * self.key_dim, bias=False) if content else None
        self.key = nn.Linear(dim_in, num_heads * self.key_dim, bias=False) if content else None
        self.value = nn.Linear(dim_in, sum(widths), bias=False)
        self.out = nn.Linear(sum(widths), dim_out, bias=bias)
        for layer in (self.query, self.key, self.value, self.out):
            if layer is not None:
                nn.init.normal_(layer.weight, std=0.02, generator=generator)
        if self.out.bias is not None:
            nn.init.zeros_(self.out.bias)
        if encoding == "relative_bias":
            self.bias_table = nn.Parameter(torch.zeros(num_heads, (2 * radius + 1) ** 2 + 1))
        else:
            self.register_parameter("bias_table", None)
            self.centre, self.sharpness = nn.Parameter(torch.zeros(num_heads, 2)), nn.Parameter(torch.zeros(num_heads))
        to_wide, to_ragged = _places(widths)
        self.register_buffer("_to_wide", to_wide, persistent=False)
        self.register_buffer("_to_ragged", to_ragged, persistent=False)

    def forward(self, tokens: Tensor, grid: Grid | None = None) -> Tensor:
        """``(batch, tokens, dim_in)`` to ``(batch, tokens, dim_out)``, for a `grid` ``(rows, columns)`` of patches.

        Raises:
            InputError: other features, a grid of another number of tokens, or one too small for a circular border.
        """
        weights = self.weights(tokens, grid)
        values = self._by_head(self.value(tokens))
        if weights.shape[0] == 1:
            mixed = torch.einsum("hqk,bhkd->bqhd", weights[0], values)
        else:
            mixed = torch.einsum("bhqk,bhkd->bqhd", weights, values)
        flat = mixed.flatten(2)
        out: Tensor = self.out(flat if self._equal else flat.index_select(2, self._to_ragged))  # type: ignore[arg-type]
        return out

    def weights(self, tokens: Tensor, grid: Grid | None = None) -> Tensor:
        """What each head gives to each patch: ``(batch, heads, tokens, tokens)``; batch 1 without content.

        Rows sum to less than one where a head also looks outside.
        """
        if tokens.dim() != 3 or tokens.shape[2] != self.dim_in:
            raise InputError(f"tokens: got shape {tuple(tokens.shape)}, expected (batch, tokens, {self.dim_in})")
        count = tokens.shape[1]
        inside, outside = self.position_logits(grid_of(count, grid or self.grid))
        logits = inside[None]
        if self.query is not None and self.key is not None:
            query, key = (
                part.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
                for part in (self.query(tokens), self.key(tokens))
            )
            logits = logits + query @ key.mT * self.key_dim**-0.5
        if outside is not None:
            logits = torch.cat([logits, outside.expand(len(logits), -1, -1, -1)], -1)
        return logits.softmax(-1)[..., :count].to(tokens.dtype)

    def position_logits(self, grid: Grid) -> tuple[Tensor, Tensor | None]:
        """Biases of the patches ``(heads, tokens, tokens)``, and of what stands outside ``(heads, tokens, cells)`` or None.

        At least in float32. Cells that do not exist have minus infinity.
        """
        rows, columns = grid
        device, reach = self.value.weight.device, self.radius
        cells = _cells((0, rows), (0, columns), device)
        offsets = cells[None] - cells[:, None]
        if self.border == "circular":
            if min(grid) < 2 * reach + 1:
                raise InputError(
                    f"grid: got {rows} x {columns}, expected at least {2 * reach + 1} patches along both axes for a circular border"
                )
            size = cells.new_tensor(grid)
            offsets = (offsets + size // 2) % size - size // 2
        inside = self._bias(offsets)
        if self.border in ("circular", "interior") or not reach:
            return inside, None
        if self.border == "zero_token":
            above_and_below = (
                ((-reach, 0), (-reach, columns + reach)),
                ((rows, rows + reach), (-reach, columns + reach)),
            )
            beside = ((0, rows), (-reach, 0)), ((0, rows), (columns, columns + reach))
            ring = torch.cat([_cells(*part, device) for part in (*above_and_below, *beside)])
            return inside, self._bias(ring[None] - cells[:, None])
        window = _cells((-reach, reach + 1), (-reach, reach + 1), device)
        there = cells[:, None] + window
        left_out = ((there < 0) | (there >= there.new_tensor(grid))).any(-1)
        return inside, self._bias(window)[:, None].masked_fill(~left_out, float("-inf"))

    @torch.no_grad()
    def look_at_(self, offsets: Tensor | Sequence[Sequence[int]], sharpness: float) -> None:
        """Let head `h` look at the patch at ``offsets[h]`` ``(rows, columns)`` from its own, changing this layer.

        Its bias there is `sharpness` above all others (with the quadratic form, times the squared distance): without
        content, what it gives to the other ``n - 1`` cells together is at most ``(n - 1) exp(-sharpness)``.

        Raises:
            InputError: another number of offsets, one beyond the radius of the table, or a sharpness that is not above 0.
        """
        wanted = torch.as_tensor(offsets, device=self.value.weight.device).long()
        if wanted.shape != (self.num_heads, 2):
            raise InputError(f"offsets: got shape {tuple(wanted.shape)}, expected ({self.num_heads}, 2)")
        if not sharpness > 0:
            raise InputError(f"sharpness: got {sharpness}, expected a positive number")
        if self.bias_table is None:
            self.centre.copy_(wanted)
            self.sharpness.fill_(sharpness)
            return
        if int(wanted.abs().max()) > self.radius:
            raise InputError(f"offsets: got one beyond the radius {self.radius} of the bias table")
        self.bias_table.zero_().scatter_(1, self._bins(wanted)[:, None], sharpness)

    @torch.no_grad()
    def shifted(self, grid: Grid, tolerance: float = 1e-6) -> ShiftedPatchProducts:
        """The same layer without a softmax, for heads that each look at one patch: products with shifted patches.

        Shares the weights of values and output. ``(rows columns)`` products of ``num_heads`` maps become one product
        before and one behind the shifts.

        Args:
            grid: largest one that it will see.
            tolerance: the share that a head may give to other cells.

        Raises:
            InputError: heads that look at content, at more than one cell, or at nothing outside (``interior``).
        """
        if self.query is not None and bool(self.query.weight.any()):
            raise InputError("content: the heads look at content; shifts need queries at zero or content=False")
        if self.border == "interior":
            raise InputError("border: interior heads spread over all patches at the rim; use zero_token or null_token")
        offsets, gap = self._peaks()
        cells = (grid[0] + 2 * self.radius) * (grid[1] + 2 * self.radius)
        left = (cells - 1) * float(torch.exp(-gap.double()))
        if not left <= tolerance:
            raise InputError(
                f"tolerance: heads give up to {left:.2g} to other cells, expected at most {tolerance:g}; raise the sharpness"
            )
        shifts = [(int(row), int(column)) for row, column in offsets.tolist()]
        return ShiftedPatchProducts(self.value, self.out, self.head_dims, shifts, self.border == "circular", self.grid)

    def extra_repr(self) -> str:
        """Sizes and settings, for the printed form."""
        return f"{self.dim_in}, {self.dim_out}, heads={self.num_heads}, radius={self.radius}, border={self.border}, {self.encoding}"

    @property
    def _equal(self) -> bool:
        return len(set(self.head_dims)) == 1

    def _by_head(self, values: Tensor) -> Tensor:
        """``(batch, tokens, sum of widths)`` to ``(batch, heads, tokens, widest)``."""
        wide = values if self._equal else functional.pad(values, (0, 1)).index_select(2, self._to_wide)  # type: ignore[arg-type]
        return wide.unflatten(2, (self.num_heads, -1)).transpose(1, 2)

    def _bins(self, offsets: Tensor) -> Tensor:
        side = 2 * self.radius + 1
        near = (offsets.abs() <= self.radius).all(-1)
        return torch.where(near, (offsets[..., 0] + self.radius) * side + offsets[..., 1] + self.radius, side**2)

    def _bias(self, offsets: Tensor) -> Tensor:
        """``(..., 2)`` to ``(heads, ...)``."""
        exact = torch.promote_types(self.value.weight.dtype, torch.float32)
        if self.bias_table is not None:
            return self.bias_table.to(exact)[:, self._bins(offsets)]
        ones = (1,) * (offsets.dim() - 1)
        away = offsets - self.centre.to(exact).view(self.num_heads, *ones, 2)
        return -self.sharpness.to(exact).view(self.num_heads, *ones) * away.square().sum(-1)

    def _peaks(self) -> tuple[Tensor, Tensor]:
        """Offset that each head looks at ``(heads, 2)``, and by how much the bias there is above all others, at least."""
        if self.bias_table is None:
            offsets = self.centre.round()
            if not torch.equal(offsets, self.centre):
                raise InputError("centre: heads look between patches; shifts need whole offsets")
            return offsets.long(), self.sharpness.min()
        best = self.bias_table.topk(2, 1)
        side, place = 2 * self.radius + 1, best.indices[:, 0]
        if bool((place == side**2).any()):
            raise InputError("bias_table: a head looks at all far patches alike; shifts need one offset a head")
        offsets = torch.stack([place // side, place % side], 1) - self.radius
        return offsets, (best.values[:, 0] - best.values[:, 1]).min()


class ShiftedPatchProducts(nn.Module):
    """``out = sum_h shift_h(x) V_h O_h``: attention whose heads each copy one neighbour, run without attention.

    Costs ``tokens * sum(head_dims) * (dim_in + dim_out)`` multiply-adds, where attention adds ``tokens^2`` times the
    width of all heads.

    Args:
        value, out: linear layers, to the heads' features and from them.
        head_dims: features of each head.
        shifts: ``(rows, columns)`` from a patch to the one that the head copies.
        circular: whether the picture goes on at the other side; zeros otherwise.
        grid: as of `RelPosPatchAttention`.
    """

    def __init__(
        self,
        value: nn.Linear,
        out: nn.Linear,
        head_dims: Sequence[int],
        shifts: Sequence[tuple[int, int]],
        circular: bool = False,
        grid: Grid | None = None,
    ) -> None:
        super().__init__()
        self.value, self.out = value, out
        self.head_dims, self.shifts, self.circular, self.grid = tuple(head_dims), tuple(shifts), circular, grid

    def forward(self, tokens: Tensor, grid: Grid | None = None) -> Tensor:
        """``(batch, tokens, dim_in)`` to ``(batch, tokens, dim_out)``."""
        rows, columns = grid_of(tokens.shape[1], grid or self.grid)
        values = self.value(tokens).unflatten(1, (rows, columns))
        reach = max(abs(step) for shift in self.shifts for step in shift)
        wide = values if self.circular else functional.pad(values, (0, 0, reach, reach, reach, reach))
        parts = []
        for part, (down, right) in zip(wide.split(self.head_dims, 3), self.shifts, strict=True):
            if self.circular:
                parts.append(part.roll((-down, -right), (1, 2)))
            else:
                parts.append(part[:, reach + down : reach + down + rows, reach + right : reach + right + columns])
        out: Tensor = self.out(torch.cat(parts, 3).flatten(1, 2))
        return out


def _cells(rows: tuple[int, int], columns: tuple[int, int], device: torch.device) -> Tensor:
    """Row and column of every cell of a rectangle ``(cells, 2)``, row by row."""
    down, right = torch.arange(*rows, device=device), torch.arange(*columns, device=device)
    return torch.stack(torch.meshgrid(down, right, indexing="ij"), -1).flatten(0, 1)


def _places(widths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Where each feature of equally wide heads stands among unequal ones (behind the last: nowhere), and back."""
    widest, total = max(widths), sum(widths)
    starts = list(itertools.accumulate(widths, initial=0))
    to_wide = [
        start + i if i < width else total for start, width in zip(starts, widths, strict=False) for i in range(widest)
    ]
    to_ragged = [head * widest + i for head, width in enumerate(widths) for i in range(width)]
    return torch.tensor(to_wide), torch.tensor(to_ragged)


def _check(
    dim_in: int, dim_out: int, num_heads: int, widths: Sequence[int], radius: int, border: str, encoding: str
) -> None:
    if min(dim_in, dim_out, num_heads) < 1 or radius < 0:
        raise InputError(
            f"dim_in, dim_out, num_heads: got {dim_in}, {dim_out}, {num_heads}, expected at least 1; radius: got {radius}, expected 0 or more"
        )
    if len(widths) != num_heads or min(widths) < 1:
        raise InputError(f"head_dim: got {list(widths)} for {num_heads} heads, expected a width of at least 1 for each")
    if border not in _BORDERS:
        raise unknown_name("border", border, _BORDERS)
    if encoding not in _ENCODINGS:
        raise unknown_name("encoding", encoding, _ENCODINGS)
    if border == "circular" and encoding == "quadratic":
        raise InputError("encoding: quadratic distances do not wrap around; use relative_bias with a circular border")
