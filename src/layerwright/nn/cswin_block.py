"""The block of CSWin: cross-shaped attention and an MLP, each behind a norm and beside a shortcut."""

from __future__ import annotations

from torch import Tensor, nn

from layerwright.core.errors import InputError
from layerwright.nn.cross_shaped_window import CrossShapedWindowAttention
from layerwright.nn.drop_path import DropPath

__all__ = ["CSWinBlock"]


class CSWinBlock(nn.Module):
    """``x + attention(LN(x))``, then ``x + MLP(LN(x))``, on maps with the channels last.

    Source: Dong et al. (2022, arXiv 2107.00652).

    Args:
        dim: channels.
        num_heads, stripe_width, full_window, mask_padding: see `CrossShapedWindowAttention`.
        mlp_ratio: hidden channels of the MLP over `dim`.
        drop_path: rate of attention and MLP.

    Raises:
        InputError: a number outside its range.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        stripe_width: int,
        mlp_ratio: float = 4.0,
        full_window: bool = False,
        drop_path: float = 0.0,
        mask_padding: bool = True,
    ) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        if hidden < 1:
            raise InputError(f"mlp_ratio: got {mlp_ratio} for {dim} channels, expected at least one hidden channel")
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn: nn.Module = CrossShapedWindowAttention(
            dim, num_heads, stripe_width, full_window, mask_padding=mask_padding
        )
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, height, width, dim)`` to the same."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        out: Tensor = x + self.drop_path(self.mlp(self.norm2(x)))
        return out
