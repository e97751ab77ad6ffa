"""Windows of bytes for studies of the demo language model, and an interval for losses of two models over them."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

from layerwright.core.calibration import Calibration
from layerwright.data.demo.train_lm import byte_tokenizer
from layerwright.studies._fixtures import byte_windows

__all__ = ["byte_data", "paired_interval"]


def byte_data(
    part: Literal["train", "calibration", "heldout"], samples: int, length: int, *, seed: int = 0, batch_size: int = 8
) -> Calibration:
    """Windows of one part of the standard library's text, as `byte_windows` draws them."""
    return byte_windows(part, byte_tokenizer(), samples, length, seed=seed, batch_size=batch_size)


def paired_interval(losses: Tensor, others: Tensor) -> tuple[float, float]:
    """95 % interval of the mean of ``losses - others``, both ``(windows,)`` of the same windows; normal over windows."""
    difference = (losses - others).double()
    mean, half = float(difference.mean()), 1.96 * float(difference.std()) / math.sqrt(len(difference))
    return mean - half, mean + half
