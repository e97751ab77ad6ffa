"""What layers compute, and what a prediction comes from.

- `lrp`: layer-wise relevance propagation through a vision transformer; `Relevance`: what it returns.
- `lrp_linear`, `lrp_conv`, `lrp_matmul`, `lrp_add`, `lrp_multiply`, `lrp_proportional`, `lrp_pixels`: its rules.
- `lrp_contribution`: the share of every layer.
- `expert_usage`: which experts of a mixture of adapters serve which layers; `UsageTable`: what it returns.
- `scale_landscape`: the loss over a plane of weight scales, or of weights, of one block; `roughness` of such a grid.
- `retrieved_experts`: how evenly retrieved experts are used; `RetrievedExperts`: what it returns.
- `positive_attention_mass`: how much of the attention to a memory is on the own document.
"""

from __future__ import annotations

from layerwright.explain.expert_usage import UsageTable, expert_usage
from layerwright.explain.positive_mass import positive_attention_mass
from layerwright.explain.retrieved_experts import RetrievedExperts, retrieved_experts
from layerwright.explain.scale_landscape import Landscape, roughness, scale_landscape
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
    "Landscape",
    "Relevance",
    "RetrievedExperts",
    "UsageTable",
    "expert_usage",
    "lrp",
    "lrp_add",
    "lrp_contribution",
    "lrp_conv",
    "lrp_linear",
    "lrp_matmul",
    "lrp_multiply",
    "lrp_pixels",
    "lrp_proportional",
    "positive_attention_mass",
    "retrieved_experts",
    "roughness",
    "scale_landscape",
]
