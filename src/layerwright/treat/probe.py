"""Compute treated weights for scorers, without touching a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from layerwright.core.treatment import Treatments
from layerwright.score.statistics import InputStatistics
from layerwright.treat.compute import treated_group

__all__ = ["treat_weights"]


def treat_weights(
    weights: Sequence[Tensor], treatments: Sequence[Treatments], statistics: InputStatistics | None
) -> list[Tensor]:
    """Dense float32 weights ``(count, out, in)`` as `treatments` would leave them, for layers that share an input."""
    results = treated_group(list(weights), list(treatments), statistics, scale_dtype=weights[0].dtype)
    return [stored.to_dense(torch.float32) for stored, _ in results]
