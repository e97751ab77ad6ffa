"""Layer-wise relevance propagation: which layers and which pixels a prediction comes from.

The rules and the pass live in `layerwright.score.relevance`, since a scorer stands on them; here is their public door.
"""

from __future__ import annotations

from layerwright.score.relevance import (
    Relevance,
    lrp,
    lrp_add,
    lrp_contribution,
    lrp_conv,
    lrp_linear,
    lrp_matmul,
    lrp_multiply,
    lrp_pixels,
    lrp_proportional,
)

__all__ = [
    "Relevance",
    "lrp",
    "lrp_add",
    "lrp_contribution",
    "lrp_conv",
    "lrp_linear",
    "lrp_matmul",
    "lrp_multiply",
    "lrp_pixels",
    "lrp_proportional",
]
