"""What a scorer gets and gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from layerwright.core.calibration import Calibration
from layerwright.core.layer import LayerRef
from layerwright.core.option import Scores
from layerwright.core.registry import Registry
from layerwright.core.treatment import Treatments

__all__ = ["SCORERS", "Scorer", "Subject", "TreatWeights"]

TreatWeights = Callable[[Sequence[Tensor], Sequence[Treatments], Any], Sequence[Tensor]]
"""``treat(weights [(count, out, in)], treatments, input statistics | None) -> dense treated weights``, for layers that
read the same input. Scorers know damages, not how a treatment is computed: the caller hands this in."""


@dataclass(frozen=True)
class Subject:
    """What is to be scored.

    Attributes:
        model: left as it is (parameters, mode, gradients and hooks are put back).
        calibration: data and loss.
        layers: the weight layers to score.
        candidates: treatment sets to judge, by layer path; a scorer that judges blocks ignores them.
        blocks: paths of the blocks to judge, for scorers of blocks.
        treat: computes a treated weight.
        seed: for scorers that draw random numbers.
        progress: called with (done, total).
    """

    model: nn.Module
    calibration: Calibration
    layers: Sequence[LayerRef] = ()
    candidates: Mapping[str, Sequence[Treatments]] = field(default_factory=dict)
    blocks: Sequence[str] = ()
    treat: TreatWeights | None = None
    seed: int = 0
    progress: Callable[[int, int], None] | None = None


Scorer = Callable[..., Scores]
"""``scorer(subject, **settings) -> Scores``."""

SCORERS: Registry[Scorer] = Registry("scorer")
"""All scorers by name; `layerwright.score` fills it."""
