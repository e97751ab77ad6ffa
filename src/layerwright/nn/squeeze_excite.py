"""Channels weighed by what the whole map holds."""

from __future__ import annotations

from torch import Tensor, nn

from layerwright.core.errors import InputError

__all__ = ["SqueezeExcite"]


class SqueezeExcite(nn.Module):
    """Multiplies each channel by a weight in (0, 1) that a two-layer network reads from the channels' means.

    ``x * sigmoid(expand(relu(norm(reduce(mean(x))))))``. Source: Hu et al., "Squeeze-and-Excitation Networks" (2018).

    Args:
        channels: of the map ``(batch, channels, height, width)``.
        reduced: width in between.
        batch_norm: a BatchNorm between the first layer and ReLU.

    Raises:
        InputError: a width below 1.
    """

    def __init__(self, channels: int, reduced: int, batch_norm: bool = False) -> None:
        super().__init__()
        if channels < 1 or reduced < 1:
            raise InputError(f"channels, reduced: got {channels} and {reduced}, expected at least 1")
        self.reduce = nn.Conv2d(channels, reduced, 1)
        self.norm = nn.BatchNorm2d(reduced) if batch_norm else nn.Identity()
        self.expand = nn.Conv2d(reduced, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, channels, height, width)`` to the same."""
        inner = self.norm(self.reduce(x.mean((2, 3), keepdim=True))).relu()
        weights: Tensor = self.expand(inner).sigmoid()
        return x * weights
