"""Widths of a convnet block by block: growing linearly, or stage by stage, and either brought to a budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, repeat
from typing import Literal

from layerwright.allocate._channels import CostFunction, check_schedule, divisible, nearest_widths, rounded_width
from layerwright.core.errors import InputError

__all__ = ["divisible", "fit_channels_to_budget", "linear_channels", "sloped_channels", "stagewise_channels"]


def sloped_channels(
    depth: int, first: float, slope: float, multiplier: float = 1.0, divisor: int | None = None
) -> list[int]:
    """Widths ``multiplier (first + slope i)`` of `depth` blocks, rounded as ReXNet's; `multiplier` below 1 keeps the first.

    Source: Han et al., 2021, arXiv 2007.00992.

    Args:
        depth: blocks, at least 2.
        first: width of the first one before `multiplier`; below 1, the first is not made narrower.
        slope: what a block adds before `multiplier`; 0 or more.
        multiplier: above 0.
        divisor: widths are multiples of it; see `divisible`.

    Raises:
        InputError: a number outside its range.
    """
    check_schedule(depth, first, multiplier, divisor)
    if not (math.isfinite(slope) and slope >= 0):
        raise InputError(f"slope: got {slope}, expected 0 or more channels a block")
    start = first / multiplier if multiplier < 1 else first
    # Sums, and not products, decide to which side halves are rounded in the published networks.
    widths = accumulate(repeat(slope, depth - 1), initial=start)
    return [rounded_width(width * multiplier, divisor) for width in widths]


def linear_channels(
    depth: int, first: float, last: float, multiplier: float = 1.0, divisor: int | None = None
) -> list[int]:
    """Widths of `depth` blocks in equal steps from `first` to `last`, times `multiplier`, rounded.

    Args:
        depth: blocks, at least 2.
        first, last: before `multiplier`; `last` is no less.
        multiplier: above 0.
        divisor: widths are multiples of it; see `divisible`.

    Raises:
        InputError: a number outside its range.
    """
    check_schedule(depth, first, multiplier, divisor)
    if not (math.isfinite(last) and last >= first):
        raise InputError(f"last: got {last}, expected at least the first width, {first}")
    step = (last - first) / (depth - 1)
    return [rounded_width(multiplier * (first + step * place), divisor) for place in range(depth)]


def stagewise_channels(
    repeats: Sequence[int], first: float, growth: float = 2.0, multiplier: float = 1.0, divisor: int | None = None
) -> list[int]:
    """The usual widths: equal inside a stage, `growth` times as wide in the next one.

    Args:
        repeats: blocks of each stage.
        first: width of the first stage before `multiplier`.
        growth: 1 or more; 2 doubles.
        multiplier: above 0.
        divisor: widths are multiples of it; see `divisible`.

    Raises:
        InputError: a number outside its range.
    """
    if not repeats or min(repeats) < 1:
        raise InputError(f"repeats: got {list(repeats)}, expected the number of blocks of each stage, at least 1")
    check_schedule(max(2, sum(repeats)), first, multiplier, divisor)
    if not (math.isfinite(growth) and growth >= 1):
        raise InputError(f"growth: got {growth}, expected at least 1")
    return [
        rounded_width(multiplier * first * growth**stage, divisor)
        for stage, blocks in enumerate(repeats)
        for _ in range(blocks)
    ]


def fit_channels_to_budget(
    kind: Literal["linear", "stagewise", "constant"],
    depth: int,
    budget: float,
    cost_fn: CostFunction,
    *,
    first: float = 16.0,
    repeats: Sequence[int] | None = None,
    growth: float = 2.0,
    divisor: int | None = None,
    tolerance: float = 0.01,
    largest: float = 65536.0,
) -> list[int]:
    """The widths of a family whose cost is nearest to `budget`, by bisection on the one number that is free.

    Args:
        kind: ``linear``: from `first` on with the slope free. ``stagewise``: `repeats` stages, each `growth` times the one
            before, the first width free. ``constant``: one width, free.
        depth: blocks, at least 2.
        budget: parameters, multiply-adds, or what `cost_fn` counts.
        cost_fn: must not fall where a width rises.
        repeats: as for `stagewise_channels`; the blocks in four parts if left out.
        divisor: widths are multiples of it, which makes few costs possible.
        tolerance: share by which the budget may be missed.
        largest: width up to which is looked.

    Raises:
        InputError: a number outside its range.
        BudgetError: a budget below the least cost, which is stated, or no widths near enough: the nearest costs are stated.
    """
    if kind not in ("linear", "stagewise", "constant"):
        raise InputError(f"kind: got {kind!r}, expected 'linear', 'stagewise' or 'constant'")
    if not 0 < tolerance < 1:
        raise InputError(f"tolerance: got {tolerance}, expected a share in (0, 1)")
    check_schedule(depth, first, 1.0, divisor)
    stages = list(repeats) if repeats is not None else [(depth + part) // 4 for part in range(4) if depth + part > 3]
    if kind == "stagewise" and sum(stages) != depth:
        raise InputError(f"repeats: got {stages}, which are {sum(stages)} blocks, expected {depth}")

    def widths(free: float) -> list[int]:
        if kind == "linear":
            return sloped_channels(depth, first, free, divisor=divisor)
        if kind == "stagewise":
            return stagewise_channels(stages, free, growth, divisor=divisor)
        return [rounded_width(free, divisor)] * depth

    return nearest_widths(widths, cost_fn, budget, 0.0 if kind == "linear" else 1.0, largest, tolerance)
