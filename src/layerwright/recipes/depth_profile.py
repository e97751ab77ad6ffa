"""What each block of a model does for its depth: the table behind ``layerwright depth``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from layerwright.core.calibration import Calibration
from layerwright.core.errors import InputError
from layerwright.recipes.bench import Bench
from layerwright.score.depth_effect import angular_distance, drop_impact, identity_gap, residual_variance

__all__ = ["BlockEffect", "DepthProfile", "profile_depth"]


@dataclass(frozen=True)
class BlockEffect:
    """One block.

    Attributes:
        block: path.
        variance: of the residual stream after it.
        angle: between its input and its output, as a share of half a turn.
        missed: rise of the loss without it; None where it was not measured.
        gap: ``||J v - v|| / ||v||`` of its Jacobian; None where it was not measured.
    """

    block: str
    variance: float
    angle: float
    missed: float | None = None
    gap: float | None = None


@dataclass(frozen=True)
class DepthProfile:
    """All blocks of a model, in order.

    Attributes:
        model: its name.
        blocks: one for each.
        unit: of the loss.
    """

    model: str
    blocks: tuple[BlockEffect, ...]
    unit: str

    def to_data(self) -> dict[str, Any]:
        """Plain data for JSON."""
        rows = [vars(block) for block in self.blocks]
        return {"model": self.model, "unit": self.unit, "blocks": rows}


def profile_depth(
    bench: Bench, samples: int = 16, *, drops: bool = True, probes: int = 2, seed: int = 0
) -> DepthProfile:
    """Measure every block of the bench's model on the first `samples` calibration samples.

    One forward pass for variance and angle; one more for each block with `drops`, and `probes` of each block for its Jacobian.

    Args:
        bench: model and data.
        samples: at least 1.
        drops: measure the loss without each block.
        probes: random directions for each Jacobian, 0 for none.
        seed: of the directions.

    Raises:
        InputError: the model has no blocks.
    """
    data: Calibration = bench.calibration.head(samples)
    variance = residual_variance(bench.model, data)
    angle = angular_distance(bench.model, data, 1, tokens="all") if len(variance) > 1 else dict.fromkeys(variance, 0.0)
    missed = _where_it_can_be(lambda: drop_impact(bench.model, data)) if drops else {}
    gap = _where_it_can_be(lambda: identity_gap(bench.model, data, probes, seed=seed)) if probes else {}
    blocks = tuple(BlockEffect(name, variance[name], angle[name], missed.get(name), gap.get(name)) for name in variance)
    return DepthProfile(bench.name, blocks, data.unit)


def _where_it_can_be(measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """What is measured, nothing where the blocks do not allow it (they change the shape, or are called by keyword)."""
    try:
        return measure()
    except (InputError, NotImplementedError):
        return {}
