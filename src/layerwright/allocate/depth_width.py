"""Depth and width together with the objective: which of the shapes of equal cost to train (Xue et al., 2022)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from layerwright.allocate.equal_parameters import Shape, equal_parameter_shapes
from layerwright.core.errors import InputError, NotFiniteError, unknown_name

__all__ = ["Comparison", "DepthWidthAllocator", "DepthWidthPlan", "compare_with_best"]

Objective = Literal["masked", "supervised"]
USUAL_ASPECT = 64.0
"""Width over depth of the usual base models (768 over 12)."""


@dataclass(frozen=True)
class Comparison:
    """A shape against the best one, paired by seed.

    Attributes:
        name: of the shape.
        mean: of its values.
        worse: mean of how much worse it is than the best one, at least 0 in expectation; 0 for the best itself.
        interval: half the width of the 95 % interval of `worse` (Student's t over seeds); None for a single seed.
    """

    name: str
    mean: float
    worse: float
    interval: float | None

    @property
    def within_noise(self) -> bool | None:
        """Whether the difference to the best one may be 0; None where a single seed cannot tell."""
        if self.worse <= 0:
            return True
        return None if self.interval is None else self.worse <= self.interval

    def to_data(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "name": self.name,
            "mean": self.mean,
            "worse": self.worse,
            "interval": self.interval,
            "within_noise": self.within_noise,
        }


def compare_with_best(values: Mapping[str, Sequence[float]], *, higher_is_better: bool = True) -> list[Comparison]:
    """Each shape against the one of the best mean, paired by seed, best first.

    Values of one seed are compared with each other, so that what a seed's data and start do to all shapes drops out. No
    correction for the number of shapes.

    Args:
        values: by shape, one for each seed, in the same order of seeds.
        higher_is_better: False for losses.

    Raises:
        InputError: nothing to compare, or unequal numbers of seeds.
        NotFiniteError: a value that is not finite.
    """
    counts = {len(found) for found in values.values()}
    if len(counts) != 1 or counts == {0}:
        raise InputError(f"values: got {sorted(counts)} seeds for {len(values)} shapes, expected as many for each")
    for name, found in values.items():
        if not all(map(math.isfinite, found)):
            raise NotFiniteError(f"values: {name} has {list(found)}, expected finite numbers; leave failed shapes out")
    sign = 1.0 if higher_is_better else -1.0
    best = max(values, key=lambda name: sign * statistics.fmean(values[name]))
    rows = []
    for name, found in values.items():
        worse = [sign * (top - own) for top, own in zip(values[best], found, strict=True)]
        rows.append(Comparison(name, statistics.fmean(found), statistics.fmean(worse), _half_width(worse)))
    return sorted(rows, key=lambda row: row.worse)


def _half_width(differences: Sequence[float]) -> float | None:
    from scipy.stats import t

    seeds = len(differences)
    if seeds < 2:
        return None
    return float(t.ppf(0.975, seeds - 1)) * statistics.stdev(differences) / math.sqrt(seeds)


@dataclass(frozen=True)
class DepthWidthPlan:
    """What `DepthWidthAllocator` chose.

    Attributes:
        shape: the choice.
        ranked: all candidates, the choice first, with what the probe gave (None without one).
        reason: one sentence.
    """

    shape: Shape
    ranked: tuple[tuple[Shape, float | None], ...]
    reason: str

    def to_data(self) -> dict[str, Any]:
        """Plain data for JSON."""
        rows = [{**shape.to_data(), "probe": value} for shape, value in self.ranked]
        return {"shape": self.shape.to_data(), "ranked": rows, "reason": self.reason}


@dataclass(frozen=True)
class DepthWidthAllocator:
    """Choose depth and width at equal parameters, by a probe where there is one, by the paper's rule otherwise.

    The rule: with masked reconstruction the deepest and narrowest candidate; with plain supervised classification, where deep
    stacks over-smooth, the one that is nearest to the usual aspect (width 64 times the depth). A probe decides better: short
    training of each shape (`layerwright.recipes.shape`), or `layerwright.score.smoothing.hc_ratio` at the last block.

    Source: Xue et al., 2022, arXiv 2205.10505.

    Args:
        objective: what the network will be trained for.
        budget_params: weights of the blocks.
        probe: ``probe(shape) -> value``, higher is better; called once for each candidate.
        depths: candidates; those that no width fits are left out.
        head_dim, heads, tolerance: see `equal_parameter_shapes`.
        margin: candidates whose probe is below the best by no more than this count as equal; the shallowest of them, which
            runs fastest, is taken.

    Raises:
        InputError: another objective, or a negative margin.
    """

    objective: Objective = "masked"
    budget_params: float = 85e6
    probe: Callable[[Shape], float] | None = None
    depths: Sequence[int] = (6, 12, 24, 48)
    head_dim: int = 64
    heads: int | None = None
    tolerance: float = 0.03
    margin: float = 0.0

    def __post_init__(self) -> None:
        if self.objective not in get_args(Objective):
            raise unknown_name("objective", self.objective, get_args(Objective))
        if not self.margin >= 0:
            raise InputError(f"margin: got {self.margin}, expected at least 0")

    def allocate(self) -> DepthWidthPlan:
        """The choice.

        Raises:
            BudgetError: no depth has a width within the tolerance.
            NotFiniteError: the probe gives a value that is not finite.
        """
        shapes = equal_parameter_shapes(
            self.budget_params, self.depths, self.head_dim, None, self.tolerance, heads=self.heads, skip=True
        )
        if self.probe is None:
            return self._by_rule(shapes)
        found = [(shape, float(self.probe(shape))) for shape in shapes]
        for shape, value in found:
            if not math.isfinite(value):
                raise NotFiniteError(f"probe: gave {value} for {shape.name}, expected a finite number")
        best = max(value for _, value in found)
        equal = [pair for pair in found if pair[1] >= best - self.margin]
        chosen = min(equal, key=lambda pair: pair[0].layers)
        rest = sorted((pair for pair in found if pair is not chosen), key=lambda pair: -pair[1])
        reason = f"{chosen[0].name}: probe {chosen[1]:.4g}, best of {len(found)} shapes {best:.4g}"
        if len(equal) > 1:
            reason += f"; {len(equal)} are within {self.margin:g} of it, and the shallowest runs fastest"
        return DepthWidthPlan(chosen[0], (chosen, *rest), reason)

    def _by_rule(self, shapes: Sequence[Shape]) -> DepthWidthPlan:
        if self.objective == "masked":
            ranked = sorted(shapes, key=lambda shape: -shape.layers)
            reason = "masked reconstruction: deeper and narrower at equal parameters; no probe was given"
        else:
            ranked = sorted(shapes, key=lambda shape: abs(math.log(shape.dim / shape.layers / USUAL_ASPECT)))
            reason = f"supervised: nearest to a width of {USUAL_ASPECT:.0f} times the depth; no probe was given"
        return DepthWidthPlan(ranked[0], tuple((shape, None) for shape in ranked), reason)
