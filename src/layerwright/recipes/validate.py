"""How well scorers predict: rank correlation of predicted with measured damage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from scipy.stats import spearmanr

from layerwright.core.layers import list_layers, treatable
from layerwright.core.treatment import Quantize, Treatments
from layerwright.recipes.bench import Bench
from layerwright.score.base import SCORERS, Subject
from layerwright.score.costs import find_blocks_or_none
from layerwright.treat.probe import treat_weights

__all__ = ["BLOCK_SCORERS", "OPTION_SCORERS", "rank_correlations"]

OPTION_SCORERS = ("fisher", "hutchinson", "second_order", "output_error", "taylor", "weight_error", "snr")
BLOCK_SCORERS = ("similarity", "attention_similarity", "block_taylor", "block_magnitude", "block_perplexity")
CANDIDATES: tuple[Treatments, ...] = tuple((Quantize(bits, method="mse"),) for bits in (2, 3))


def rank_correlations(
    bench: Bench, *, scorers: Sequence[str] = OPTION_SCORERS + BLOCK_SCORERS, every: int = 1, seed: int = 0
) -> dict[str, float]:
    """Spearman's correlation of each scorer with the measured change of the loss on the calibration data.

    Scorers of treatments are held against `loss_swap` over all layers (or every `every`-th) at 2 and 3 bits, scorers of
    blocks against `block_removal`.
    """
    refs = treatable(bench.model, list_layers(bench.model))[::every]
    blocks = [path for stack in find_blocks_or_none(bench.model) for path in stack.names]
    subject = Subject(
        bench.model,
        bench.calibration,
        layers=refs,
        candidates={ref.path: CANDIDATES for ref in refs},
        blocks=blocks,
        treat=treat_weights,
        seed=seed,
    )
    found: dict[str, float] = {}
    truth: dict[str, dict[Any, float]] = {}
    for name in scorers:
        kind = "block_removal" if name in BLOCK_SCORERS else "loss_swap"
        if kind not in truth:
            measured = SCORERS.get(kind)(replace(subject))
            truth[kind] = dict(measured.sensitivities) or dict(measured.damages)
        scores = SCORERS.get(name)(subject)
        predicted: dict[Any, float] = dict(scores.sensitivities if kind == "block_removal" else scores.damages)
        keys = [key for key in truth[kind] if key in predicted]
        if len(keys) > 2:
            found[name] = float(spearmanr([predicted[k] for k in keys], [truth[kind][k] for k in keys]).statistic)
    return found
