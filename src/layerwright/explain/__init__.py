"""What layers compute, and what a prediction comes from.

- `lrp`: layer-wise relevance propagation through a vision transformer; `Relevance`: what it returns.
- `lrp_linear`, `lrp_conv`, `lrp_matmul`, `lrp_add`, `lrp_multiply`, `lrp_proportional`, `lrp_pixels`: its rules.
- `lrp_contribution`: the share of every layer.
- `expert_usage`: which experts of a mixture of adapters serve which layers; `UsageTable`: what it returns.
- `scale_landscape`: the loss over a plane of weight scales, or of weights, of one block; `roughness` of such a grid.
- `retrieved_experts`: how evenly retrieved experts are used; `RetrievedExperts`: what it returns.
- `positive_attention_mass`: how much of the attention to a memory is on the own document.
- `GuidedBackprop`: what raises a unit, by guided backpropagation, deconvnet or gradient; `randomization_check` of such maps.
- `text_diversity`, `self_bleu`, `corpus_bleu`, `collapse_reason`: how good and how varied generated sentences are (SADPGAN).
- `mel_cepstral_distortion`, `speaker_similarity`, `diagonal_attention`: how near speech is to the true one (TDASS).
- `linear_cka`: how alike two sets of features are.
- `receptive_field`: which input positions an output position depends on, by gradient.
- `aggregation_maps`: where a network that pools by attention looks.
"""

from __future__ import annotations

from layerwright.explain.aggregation_map import aggregation_maps
from layerwright.explain.expert_usage import UsageTable, expert_usage
from layerwright.explain.guided_backprop import GuidedBackprop, randomization_check
from layerwright.explain.linear_cka import linear_cka
from layerwright.explain.positive_mass import positive_attention_mass
from layerwright.explain.receptive_field import receptive_field
from layerwright.explain.retrieved_experts import RetrievedExperts, retrieved_experts
from layerwright.explain.scale_landscape import Landscape, roughness, scale_landscape
from layerwright.explain.speech_distance import (
    diagonal_attention,
    mel_cepstral_distortion,
    speaker_similarity,
    warped_distance,
)
from layerwright.explain.text_diversity import (
    BleuReference,
    collapse_reason,
    corpus_bleu,
    diversity_against,
    reverse_nll,
    self_bleu,
    text_diversity,
)
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
    "BleuReference",
    "GuidedBackprop",
    "Landscape",
    "Relevance",
    "RetrievedExperts",
    "UsageTable",
    "aggregation_maps",
    "collapse_reason",
    "corpus_bleu",
    "diagonal_attention",
    "diversity_against",
    "expert_usage",
    "linear_cka",
    "lrp",
    "lrp_add",
    "lrp_contribution",
    "lrp_conv",
    "lrp_linear",
    "lrp_matmul",
    "lrp_multiply",
    "lrp_pixels",
    "lrp_proportional",
    "mel_cepstral_distortion",
    "positive_attention_mass",
    "randomization_check",
    "receptive_field",
    "retrieved_experts",
    "reverse_nll",
    "roughness",
    "scale_landscape",
    "self_bleu",
    "speaker_similarity",
    "text_diversity",
    "warped_distance",
]
