"""Classifiers for the features of a vision network."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from layerwright.core.errors import InputError

__all__ = ["CosineHead", "DistilledHead", "GlobalAvgHead"]


def _pooled(features: Tensor) -> Tensor:
    """Means over the positions of a map ``(batch, channels, height, width)``; features ``(batch, channels)`` as they are."""
    return features.mean((2, 3)) if features.dim() == 4 else features


class GlobalAvgHead(nn.Module):
    """A linear classifier of the mean over all positions.

    Args:
        dim: channels of the features.
        num_classes: of the logits, at least 1.

    Raises:
        InputError: fewer than one class or channel.
    """

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        _check(dim, num_classes)
        self.fc = nn.Linear(dim, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        """Logits ``(batch, num_classes)`` of ``(batch, dim, height, width)`` or ``(batch, dim)``."""
        logits: Tensor = self.fc(_pooled(features))
        return logits


class DistilledHead(nn.Module):
    """Two linear classifiers, one of the labels and one of a teacher's answers.

    In training mode both logits come back; in evaluation mode their mean. Source: Touvron et al., "Training
    data-efficient image transformers" (2021).

    Args:
        dim: channels of the features.
        num_classes: of the logits, at least 1.

    Raises:
        InputError: fewer than one class or channel.
    """

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        _check(dim, num_classes)
        self.head = nn.Linear(dim, num_classes)
        self.dist_head = nn.Linear(dim, num_classes)

    def forward(self, features: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """``(batch, num_classes)``, twice in training mode."""
        pooled = _pooled(features)
        own, taught = self.head(pooled), self.dist_head(pooled)
        return (own, taught) if self.training else (own + taught) / 2


class CosineHead(nn.Module):
    """Cosines between the features and a learnt direction for each class, divided by a temperature.

    Args:
        dim: channels of the features.
        num_classes: of the logits, at least 1.
        temperature: above 0.

    Raises:
        InputError: a number outside its range.
    """

    def __init__(self, dim: int, num_classes: int, temperature: float = 0.07) -> None:
        super().__init__()
        _check(dim, num_classes)
        if not temperature > 0:
            raise InputError(f"temperature: got {temperature}, expected a positive number")
        self.temperature = temperature
        self.weight = nn.Parameter(torch.empty(num_classes, dim))
        nn.init.normal_(self.weight)

    def forward(self, features: Tensor) -> Tensor:
        """Logits ``(batch, num_classes)``."""
        cosines = functional.normalize(_pooled(features), dim=-1) @ functional.normalize(self.weight, dim=-1).T
        return cosines / self.temperature


def _check(dim: int, num_classes: int) -> None:
    if dim < 1 or num_classes < 1:
        raise InputError(f"dim, num_classes: got {dim} and {num_classes}, expected at least 1")
