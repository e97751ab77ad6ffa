"""Layer normalisation of every position of a map over its channels."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

__all__ = ["ChannelNorm"]


class ChannelNorm(nn.LayerNorm):
    """`nn.LayerNorm` over the channels of a map ``(batch, channels, height, width)``, position by position.

    Args:
        channels: of the map.
        eps: added to the variance.
    """

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__(channels, eps=eps)

    def forward(self, input: Tensor) -> Tensor:
        """The normalised map, of the same shape; the memory format ``channels_last`` spares the copies."""
        rows = input.permute(0, 2, 3, 1)
        return functional.layer_norm(rows, self.normalized_shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)
