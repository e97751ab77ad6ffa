"""Pruning of weights: magnitude, Wanda, and SparseGPT with or without quantization."""

from __future__ import annotations

from layerwright.treat.prune._masks import (
    magnitude_mask,
    removed_weights,
    smallest,
    spread_evenly,
    two_of_four,
    wanda_mask,
)
from layerwright.treat.prune._sparsegpt import sparsegpt

__all__ = ["magnitude_mask", "removed_weights", "smallest", "sparsegpt", "spread_evenly", "two_of_four", "wanda_mask"]
