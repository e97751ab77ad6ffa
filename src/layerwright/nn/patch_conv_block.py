"""The residual block of PatchConvNet: a depth-wise convolution between two 1 x 1 convolutions, at constant size."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from layerwright.core.errors import InputError
from layerwright.nn.channel_norm import ChannelNorm
from layerwright.nn.drop_path import DropPath
from layerwright.nn.squeeze_excite import SqueezeExcite

__all__ = ["PatchConvBlock"]


class PatchConvBlock(nn.Module):
    """``x + g * PW2(SE(GELU(DW3x3(GELU(PW1(LN(x)))))))``, on maps; the norm is over the channels of each position.

    ``2 C^2 + 9 C`` multiply-adds a position. Without the scales `g` networks of 60 blocks and more do not train.

    Source: Touvron et al., "Augmenting Convolutional networks with attention-based aggregation" (2021, arXiv
    2112.13692).

    Args:
        dim: channels.
        drop_path: rate of the branch.
        layer_scale: first values of `g`, one for each channel; 1e-4 in the smallest published network, 1e-6 in the others.

    Raises:
        InputError: a number outside its range.
    """

    def __init__(self, dim: int, drop_path: float = 0.0, layer_scale: float = 1e-6) -> None:
        super().__init__()
        if dim < 1:
            raise InputError(f"dim: got {dim}, expected at least 1")
        self.norm = ChannelNorm(dim)
        self.pwconv1 = nn.Conv2d(dim, dim, 1)
        self.act = nn.GELU()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.squeeze = SqueezeExcite(dim, max(1, round(dim / 4)))
        self.pwconv2 = nn.Conv2d(dim, dim, 1)
        self.layer_scale = nn.Parameter(torch.full((dim,), layer_scale))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, dim, height, width)`` to the same."""
        inner = self.act(self.dwconv(self.act(self.pwconv1(self.norm(x)))))
        inner = self.pwconv2(self.squeeze(inner))
        out: Tensor = x + self.drop_path(self.layer_scale[:, None, None] * inner)
        return out
