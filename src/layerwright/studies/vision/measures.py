"""Measures of classifiers, masks and maps of importance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from layerwright.core.calibration import evaluating

__all__ = [
    "accuracy",
    "calibration_error",
    "mean_iou",
    "pointing_game",
    "predict",
    "worst_of",
]


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, batch: int = 256) -> Tensor:
    """Logits ``(samples, classes)`` in evaluation mode."""
    with evaluating(model):
        return torch.cat([model(part) for part in images.split(batch)])


def accuracy(model: nn.Module, images: Tensor, labels: Tensor, batch: int = 256) -> float:
    """Share of pictures whose largest logit is that of their label."""
    return float((predict(model, images, batch).argmax(1) == labels).float().mean())


def mean_iou(predicted: Tensor, true: Tensor, classes: int) -> float:
    """Mean over the classes that occur of intersection over union, from class maps of one shape."""
    table = torch.bincount(classes * true.flatten() + predicted.flatten(), minlength=classes**2).reshape(
        classes, classes
    )
    both, either = table.diagonal(), table.sum(0) + table.sum(1) - table.diagonal()
    there = either > 0
    return float((both[there] / either[there]).mean())


def pointing_game(maps: Tensor, masks: Tensor, margin: int = 0) -> float:
    """Share of maps ``(samples, height, width)`` whose largest value lies in its mask, widened by `margin` pixels.

    Source: Zhang et al., "Top-down Neural Attention by Excitation Backprop" (2018).
    """
    wide = functional.max_pool2d(masks[:, None].float(), 2 * margin + 1, stride=1, padding=margin)[:, 0]
    return float(wide.flatten(1).gather(1, maps.flatten(1).argmax(1, keepdim=True)).mean())


def calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error: mean gap between confidence and accuracy over bins of equal width (Guo et al., 2017)."""
    sure, found = logits.float().softmax(1).max(1)
    right = (found == labels).float()
    place = (sure * bins).long().clamp_max(bins - 1)
    gap = torch.zeros(bins).index_add(0, place, right - sure)
    return float(gap.abs().sum() / len(labels))


def worst_of(rows: Sequence[Mapping[str, Any]], arm: str, column: str, *, largest: bool = False) -> float:
    """The smallest (or largest) value of a column over the seeds of an arm."""
    values = [float(row[column]) for row in rows if row["arm"] == arm]
    return max(values) if largest else min(values)
