"""Layer-wise relevance propagation: what each layer contributes to the class that a model of images predicts."""

from __future__ import annotations

from layerwright.score.relevance.contribution import contributions, lrp_contribution
from layerwright.score.relevance.propagate import Relevance, lrp
from layerwright.score.relevance.rules import (
    lrp_add,
    lrp_conv,
    lrp_linear,
    lrp_matmul,
    lrp_multiply,
    lrp_pixels,
    lrp_proportional,
    safe_divide,
)

__all__ = [
    "Relevance",
    "contributions",
    "lrp",
    "lrp_add",
    "lrp_contribution",
    "lrp_conv",
    "lrp_linear",
    "lrp_matmul",
    "lrp_multiply",
    "lrp_pixels",
    "lrp_proportional",
    "safe_divide",
]
