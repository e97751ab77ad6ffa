"""Continued pretraining: all weights, on the labels."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from layerwright.core.calibration import Calibration, LossFunction
from layerwright.tune._loop import Progress, opening, restore_flags_, train_, trainable_copy

__all__ = ["full"]

M = TypeVar("M", bound=nn.Module)


def full(
    model: M,
    calibration: Calibration | Any,
    *,
    teacher: nn.Module | None = None,
    loss_fn: LossFunction | None = None,
    seed: int = 0,
    steps: int = 100,
    learning_rate: float = 1e-4,
    weight_decay: float = 0.1,
    warmup: float = 0.05,
    batches_per_step: int = 1,
    clip: float = 1.0,
    progress: Progress | None = None,
) -> M:
    """A copy of `model` with all its dense parameters trained on the calibration's own loss.

    AdamW with warm-up and weight decay, as for continued pretraining after block removal (Kim et al., 2024, arXiv
    2402.02834). Packed weights stay. Memory: four times the trained parameters in float32.

    Args:
        model: left untouched.
        calibration: batches with labels, or with a loss function.
        teacher: not used; every tuner takes one.
        loss_fn: ``loss_fn(model, batch) -> scalar``, where batches have no labels.
        seed, steps, learning_rate, weight_decay, warmup, batches_per_step, clip: see `Schedule`.
        progress: ``progress(name, done, total)``.

    Raises:
        InputError: a setting outside its range, nothing to train, or a loss that is not finite.
        TypeError: no labels and no loss function.
    """
    del teacher
    data, schedule = opening(
        calibration, loss_fn, steps, learning_rate, weight_decay, warmup, batches_per_step, clip, seed
    )
    copy = trainable_copy(model, lambda _name, _tensor: True)
    train_(copy, list(data), data.loss, schedule, progress=progress, name="full tuning")
    restore_flags_(copy, model)
    return copy
