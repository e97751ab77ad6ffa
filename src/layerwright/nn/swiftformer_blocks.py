"""The two blocks of SwiftFormer: convolutions alone, and convolutions with additive attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from layerwright.core.errors import InputError
from layerwright.nn.additive_attention import EfficientAdditiveAttention, QueryWeights
from layerwright.nn.drop_path import DropPath

__all__ = ["ChannelScale", "ConvEncoder", "SwiftFormerEncoder"]


class ChannelScale(nn.Module):
    """A learnt factor for each channel of a map ``(batch, channels, height, width)``, all `start` at first."""

    def __init__(self, channels: int, start: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels, 1, 1), start))

    def forward(self, x: Tensor) -> Tensor:
        """The map times the factors."""
        return x * self.weight


class ConvEncoder(nn.Module):
    """``x + scale * PW2(GELU(PW1(BN(DW3x3(x)))))``, on maps.

    Source: Shaker et al. (2023, arXiv 2303.15446). With ``hidden_dim = dim`` it is the local representation of
    `SwiftFormerEncoder`.

    Args:
        dim: channels.
        hidden_dim: channels between the two 1 x 1 convolutions.

    Raises:
        InputError: a number below 1.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        if dim < 1 or hidden_dim < 1:
            raise InputError(f"dim, hidden_dim: got {dim} and {hidden_dim}, expected at least 1")
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm: nn.Module = nn.BatchNorm2d(dim)
        self.pwconv1 = nn.Conv2d(dim, hidden_dim, 1)
        self.act = nn.GELU()
        self.pwconv2 = nn.Conv2d(hidden_dim, dim, 1)
        self.layer_scale: nn.Module = ChannelScale(dim)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, dim, height, width)`` to the same."""
        inner = self.pwconv2(self.act(self.pwconv1(self.norm(self.dwconv(x)))))
        out: Tensor = x + self.layer_scale(inner)
        return out


class SwiftFormerEncoder(nn.Module):
    """Local representation, then ``x + s1 * attention(x)``, then ``x + s2 * MLP(BN(x))`` with 1 x 1 convolutions.

    Source: Shaker et al. (2023, arXiv 2303.15446).

    Args:
        dim: channels.
        mlp_ratio: hidden channels of the MLP over `dim`.
        layer_scale: first values of `s1` and `s2`.
        drop_path: rate of attention and MLP.
        query_weights: see `EfficientAdditiveAttention`.

    Raises:
        InputError: a number outside its range.
    """

    def __init__(
        self,
        dim: int,
        mlp_ratio: float = 4,
        layer_scale: float = 1e-5,
        drop_path: float = 0.0,
        query_weights: QueryWeights = "l2",
    ) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        if hidden < 1:
            raise InputError(f"mlp_ratio: got {mlp_ratio} for {dim} channels, expected at least one hidden channel")
        self.local_representation = ConvEncoder(dim, dim)
        self.attn: nn.Module = EfficientAdditiveAttention(dim, query_weights=query_weights)
        self.layer_scale_1: nn.Module = ChannelScale(dim, layer_scale)
        self.norm: nn.Module = nn.BatchNorm2d(dim)
        self.fc1, self.act, self.fc2 = nn.Conv2d(dim, hidden, 1), nn.GELU(), nn.Conv2d(hidden, dim, 1)
        self.layer_scale_2: nn.Module = ChannelScale(dim, layer_scale)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, dim, height, width)`` to the same."""
        x = self.local_representation(x)
        mixed = self.attn(x.flatten(2).transpose(1, 2)).transpose(1, 2).view_as(x)
        x = x + self.drop_path(self.layer_scale_1(mixed))
        out: Tensor = x + self.drop_path(self.layer_scale_2(self.fc2(self.act(self.fc1(self.norm(x))))))
        return out
