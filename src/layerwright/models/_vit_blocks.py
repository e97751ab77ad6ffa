"""Parts of vision transformers with norms before the parts: patches, fixed positions, blocks."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from layerwright.core.errors import InputError

__all__ = ["VitBlock", "checked_heads", "patches_of", "sincos_positions", "start_"]


def checked_heads(dim: int, heads: int, name: str = "heads") -> int:
    """`heads`, if it divides `dim`.

    Raises:
        InputError: it does not.
    """
    if heads < 1 or dim < 1 or dim % heads:
        raise InputError(f"{name}: got {heads} for a width of {dim}, expected a divisor, so that heads have one width")
    return heads


def patches_of(images: Tensor, patch: int) -> Tensor:
    """Pixels of each patch, row by row, channels last within a pixel: ``(batch, C, H, W) -> (batch, n, patch patch C)``."""
    batch, channels, height, width = images.shape
    rows, columns = height // patch, width // patch
    cut = images.reshape(batch, channels, rows, patch, columns, patch)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, patch * patch * channels)


def sincos_positions(dim: int, side: int, *, cls_token: bool = True) -> Tensor:
    """Fixed 2-D sine-cosine positions ``(side side [+ 1], dim)``: half of the features for columns, half for rows.

    A class token in front has zeros.

    Raises:
        InputError: a width that is no multiple of 4.
    """
    if dim % 4:
        raise InputError(f"dim: got {dim}, expected a multiple of 4: sines and cosines of two coordinates")
    rates = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    places = torch.arange(side, dtype=torch.float64)[:, None] * rates
    line = torch.cat([places.sin(), places.cos()], 1)
    half = dim // 2
    table = torch.cat([line.expand(side, side, half), line[:, None].expand(side, side, half)], -1)
    flat = table.reshape(side * side, dim).float()
    return torch.cat([torch.zeros(1, dim), flat]) if cls_token else flat


class VitBlock(nn.Module):
    """``x + attention(norm(x))``, then ``x + ffn(norm(x))``; biases everywhere, GELU, ``12 dim^2`` weights at ratio 4.

    Args:
        dim: features of a token.
        heads: divides `dim`.
        ffn_ratio: width of the feed-forward part over `dim`.
        eps: of the norms.
    """

    def __init__(self, dim: int, heads: int, ffn_ratio: float = 4.0, eps: float = 1e-6) -> None:
        super().__init__()
        self.heads = checked_heads(dim, heads)
        inner = round(dim * ffn_ratio)
        self.attention_norm = nn.LayerNorm(dim, eps=eps)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.ffn_norm = nn.LayerNorm(dim, eps=eps)
        self.ffn = nn.Sequential(nn.Linear(dim, inner), nn.GELU(), nn.Linear(inner, dim))

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, tokens, dim)`` to the same."""
        query, key, value = self._heads(self.attention_norm(x))
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.ffn(self.ffn_norm(x))  # type: ignore[no-any-return]

    def weights(self, x: Tensor) -> Tensor:
        """Attention weights ``(batch, heads, tokens, tokens)`` of the block's input ``(batch, tokens, dim)``."""
        query, key, _ = self._heads(self.attention_norm(x))
        return (query @ key.mT / math.sqrt(query.shape[-1])).softmax(-1)

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, tokens, dim = x.shape
        parts = self.qkv(x).view(batch, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        return parts[0], parts[1], parts[2]


def start_(module: nn.Module, patches: nn.Module) -> None:
    """Xavier weights (of `patches` as one flat matrix), zero biases, in place: the start of masked autoencoders."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(part.weight.flatten(1) if part is patches else part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
