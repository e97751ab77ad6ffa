"""Arms of a comparison: what is built, what it costs, how it fares, over seeds."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from layerwright.core.errors import InputError
from layerwright.studies.sequence.evaluation import bits_per_byte
from layerwright.studies.sequence.models import parameter_counts
from layerwright.studies.sequence.training import train_bytes

__all__ = ["Arm", "compare", "match_width", "mean_of", "paired"]

Progress = Callable[[str, int, int], None]
WORST = math.log(256) / math.log(2)


@dataclass(frozen=True)
class Arm:
    """One of the models that are compared.

    Attributes:
        name: in the table.
        build: ``build(seed)`` makes the untrained model.
        settings: further arguments of `train_bytes`, such as a learning rate.
        matched: quantities that were made equal, for the table.
    """

    name: str
    build: Callable[[int], nn.Module]
    settings: Mapping[str, Any] = field(default_factory=dict)
    matched: Mapping[str, Any] = field(default_factory=dict)


def compare(
    arms: Sequence[Arm],
    *,
    steps: int,
    seeds: Sequence[int],
    batch: int = 32,
    context: int = 128,
    windows: int = 256,
    measure: Callable[[str, nn.Module], Mapping[str, Any]] | None = None,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Train every arm on every seed with the same windows; a row each: arm, seed, bits per byte, parameters, seconds.

    A row of an arm whose loss is not finite or worse than chance has ``failed`` set; it is not left out.

    Args:
        arms: at least one; names differ.
        steps, batch, context: see `train_bytes`.
        windows: of held-out text.
        measure: ``measure(arm name, trained model)`` adds columns.
    """
    rows: list[dict[str, Any]] = []
    for seed in seeds:
        for number, arm in enumerate(arms):
            begun = time.perf_counter()
            model = arm.build(seed)
            row: dict[str, Any] = {"arm": arm.name, "seed": seed, "parameters": parameter_counts(model)["other"]}
            row |= arm.matched
            try:
                train_bytes(model, steps=steps, batch=batch, context=context, seed=seed, **arm.settings)
                row["bits/byte"] = bits_per_byte(model, windows=windows, context=context)
            except InputError as error:
                if "not finite" not in str(error):
                    raise
                row["bits/byte"] = float("nan")
            row["failed"] = not row["bits/byte"] <= WORST
            if measure and not row["failed"]:
                row |= measure(arm.name, model)
            row["seconds"] = time.perf_counter() - begun
            rows.append(row)
            if progress:
                progress(f"seed {seed}", number + 1, len(arms))
    return rows


def paired(rows: Sequence[Mapping[str, Any]], first: str, second: str, column: str = "bits/byte") -> list[float]:
    """``first - second`` of a column for each seed that both arms have, in order of seeds."""
    values = {(row["arm"], row["seed"]): row.get(column, float("nan")) for row in rows}
    seeds = sorted({seed for arm, seed in values if arm == first} & {seed for arm, seed in values if arm == second})
    if not seeds:
        raise InputError(f"arms: no seed has both {first!r} and {second!r}")
    return [values[first, seed] - values[second, seed] for seed in seeds]


def match_width(
    cost: Callable[[int], float], target: float, *, low: int = 1, high: int = 1 << 16, tolerance: float = 0.01
) -> int:
    """The width whose ``cost(width)``, which rises with it, comes closest to `target`.

    Raises:
        InputError: even the closest is off by more than the share `tolerance`.
    """
    first, last = low, high
    while first < last:
        middle = (first + last) // 2
        first, last = (middle + 1, last) if cost(middle) < target else (first, middle)
    best = min((width for width in (first - 1, first) if low <= width <= high), key=lambda w: abs(cost(w) - target))
    if abs(cost(best) - target) > tolerance * target:
        raise InputError(
            f"width: the closest, {best}, costs {cost(best):g} where {target:g} is wanted (tolerance {tolerance:g})"
        )
    return best


def mean_of(rows: Sequence[Mapping[str, Any]], arm: str, column: str = "bits/byte") -> float:
    """Mean of a column over the seeds of an arm."""
    return statistics.fmean(row[column] for row in rows if row["arm"] == arm)
