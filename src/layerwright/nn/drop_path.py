"""Whole residual branches left out at random, sample by sample."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from layerwright.core.errors import InputError

__all__ = ["DropPath", "drop_path_rates"]


class DropPath(nn.Module):
    """Sets a residual branch to zero for a share `rate` of the samples, and scales the others by ``1 / (1 - rate)``.

    The identity in evaluation mode. Source: Huang et al., "Deep Networks with Stochastic Depth" (2016).

    Args:
        rate: probability that a sample loses the branch, in [0, 1).

    Raises:
        InputError: a rate outside that range.
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise InputError(f"drop_path: got {rate}, expected a probability in [0, 1)")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, ...)`` to the same."""
        if not self.training or not self.rate:
            return x
        shape = (x.shape[0],) + (1,) * (x.dim() - 1)
        kept = torch.empty(shape, dtype=x.dtype, device=x.device).bernoulli_(1 - self.rate)
        return x * kept.div_(1 - self.rate)

    def extra_repr(self) -> str:
        """The rate, for the printed form."""
        return f"rate={self.rate:g}"


def drop_path_rates(highest: float, blocks: int) -> list[float]:
    """Rates that grow linearly from 0 at the first block to `highest` at the last."""
    return [highest * number / max(1, blocks - 1) for number in range(blocks)]
