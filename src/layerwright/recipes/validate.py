"""How well scorers predict: rank correlation of predicted with measured damage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from scipy.stats import spearmanr

from layerwright.core.layers import list_layers, treatable
from layerwright.core.treatment import LowRank, Quantize, Sparsify, Treatments
from layerwright.recipes.bench import Bench
from layerwright.score.base import SCORERS, Subject
from layerwright.score.costs import find_blocks_or_none
from layerwright.treat.probe import treat_weights

__all__ = ["BLOCK_SCORERS", "OPTION_SCORERS", "rank_correlations"]

OPTION_SCORERS = (
    "anchored_fisher",
    "fisher",
    "hutchinson",
    "second_order",
    "output_error",
    "taylor",
    "weight_error",
    "snr",
)
BLOCK_SCORERS = ("similarity", "attention_similarity", "block_taylor", "block_magnitude", "block_perplexity")
CANDIDATES: tuple[Treatments, ...] = (
    (Quantize(2, method="mse"),),
    (Quantize(3, method="mse"),),
    (Sparsify(0.7, method="wanda"),),
    (LowRank(32),),
)


def rank_correlations(
    bench: Bench,
    *,
    scorers: Sequence[str] = OPTION_SCORERS + BLOCK_SCORERS,
    every: int = 1,
    seed: int = 0,
    progress: Callable[[str, float], None] | None = None,
) -> dict[str, float]:
    """Spearman's correlation of each scorer with the measured change of the loss on the calibration data.

    Scorers of treatments are held against `loss_swap` over all layers (or every `every`-th) at 2 and 3 bits, 70%
    zeros and rank 32 where that is below the layer's own; scorers of blocks against `block_removal`.

    Args:
        progress: called with the name of each scorer and the seconds it took, the measured ones included.
    """
    refs = treatable(bench.model, list_layers(bench.model))[::every]
    blocks = [path for stack in find_blocks_or_none(bench.model) for path in stack.names]
    subject = Subject(
        bench.model,
        bench.calibration,
        layers=refs,
        candidates={ref.path: tuple(c for c in CANDIDATES if _fits(c, ref.shape)) for ref in refs},
        blocks=blocks,
        treat=treat_weights,
        seed=seed,
    )
    found: dict[str, float] = {}
    truth: dict[str, dict[Any, float]] = {}

    def values(name: str) -> dict[Any, float]:
        scores = SCORERS.get(name)(subject)
        if progress is not None:
            progress(name, scores.seconds)
        return dict(scores.sensitivities if _judges_blocks(name) else scores.damages)

    for name in scorers:
        kind = "block_removal" if _judges_blocks(name) else "loss_swap"
        if kind not in truth:
            truth[kind] = values(kind)
        predicted = values(name)
        keys = [key for key in truth[kind] if key in predicted]
        if len(keys) > 2:
            found[name] = float(spearmanr([predicted[k] for k in keys], [truth[kind][k] for k in keys]).statistic)
    return found


def _judges_blocks(name: str) -> bool:
    return name in BLOCK_SCORERS or name == "block_removal"


def _fits(treatments: Treatments, shape: tuple[int, int]) -> bool:
    return all(not isinstance(t, LowRank) or t.inner < min(shape) for t in treatments)
