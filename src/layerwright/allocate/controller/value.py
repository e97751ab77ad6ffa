"""What an accuracy is worth to the controller."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from layerwright.core.errors import InputError

__all__ = ["Baseline", "reward"]

HIGHEST = 1 - 1e-6
"""Accuracy above which the reward does not rise: at 1 the tangent has no value."""


def reward(accuracy: float) -> float:
    """``tan(accuracy * pi / 2)``: a point near the top is worth more than one further down.

    Raises:
        InputError: an accuracy outside 0..1.

    Source: Cai et al., 2017.
    """
    if not 0 <= accuracy <= 1:
        raise InputError(f"accuracy: got {accuracy}, expected a share between 0 and 1")
    return math.tan(min(accuracy, HIGHEST) * math.pi / 2)


@dataclass
class Baseline:
    """A moving average of mean rewards that takes the present batch in, as the released search does.

    With the released `decay` of 0.95 it is nearly the mean of the present batch.

    Attributes:
        decay: share of the way that it goes to each new mean.
        value: of the average; starts at 0.
    """

    decay: float = 0.95
    value: float = 0.0

    def advantages(self, rewards: Sequence[float]) -> list[float]:
        """Move to the mean of `rewards`; each reward less the average."""
        self.value += self.decay * (statistics.fmean(rewards) - self.value)
        return [one - self.value for one in rewards]
