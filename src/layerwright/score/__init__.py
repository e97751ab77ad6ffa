"""Model + calibration -> damage or sensitivity per layer and block.

A damage is an increase of the loss (lower is better); the scorers of blocks give sensitivities (higher is more
important). Every scorer is in `SCORERS` by name and takes a `Subject`.
"""

from layerwright.score.activation_range import activation_range
from layerwright.score.anchors import anchored_fisher
from layerwright.score.base import SCORERS, Scorer, Subject, TreatWeights
from layerwright.score.blocks import (
    attention_similarity,
    block_magnitude,
    block_perplexity,
    block_removal,
    block_taylor,
    similarity,
)
from layerwright.score.costs import count_flops, profile_model
from layerwright.score.depth_effect import angular_distance, drop_impact, identity_gap, residual_variance
from layerwright.score.exit_curve import exit_curve, exit_records
from layerwright.score.exit_taylor import exit_taylor
from layerwright.score.finetuning_profile import FinetuningProfile, finetuning_profile
from layerwright.score.inputs import walk_inputs
from layerwright.score.linear_probe import linear_probe
from layerwright.score.options import (
    fisher,
    hutchinson,
    loss_swap,
    output_error,
    second_order,
    snr,
    taylor,
    weight_error,
)
from layerwright.score.output_rows import output_row_loss
from layerwright.score.rank_ratio import RankReport, rank_ratio, score_layers_rank
from layerwright.score.smoothing import (
    frequency_profile,
    hc_ratio,
    high_frequency_share,
    pairwise_cosine,
    smoothing_rate,
    token_cosine,
)
from layerwright.score.statistics import InputStatistics
from layerwright.score.token_errors import token_error_rate
from layerwright.score.variance_profile import variance_profile

__all__ = [
    "SCORERS",
    "FinetuningProfile",
    "InputStatistics",
    "RankReport",
    "Scorer",
    "Subject",
    "TreatWeights",
    "activation_range",
    "anchored_fisher",
    "angular_distance",
    "attention_similarity",
    "block_magnitude",
    "block_perplexity",
    "block_removal",
    "block_taylor",
    "count_flops",
    "drop_impact",
    "exit_curve",
    "exit_records",
    "exit_taylor",
    "finetuning_profile",
    "fisher",
    "frequency_profile",
    "hc_ratio",
    "high_frequency_share",
    "hutchinson",
    "identity_gap",
    "linear_probe",
    "loss_swap",
    "output_error",
    "output_row_loss",
    "pairwise_cosine",
    "profile_model",
    "rank_ratio",
    "residual_variance",
    "score_layers_rank",
    "second_order",
    "similarity",
    "smoothing_rate",
    "snr",
    "taylor",
    "token_cosine",
    "token_error_rate",
    "variance_profile",
    "walk_inputs",
    "weight_error",
]

SCORERS.add("emq", "layerwright.score.proxies.scorer:emq")
SCORERS.add("lrp", "layerwright.score.relevance.contribution:lrp_scorer")
SCORERS.add("compression_probes", "layerwright.score.compression_probes:compression_probes")
