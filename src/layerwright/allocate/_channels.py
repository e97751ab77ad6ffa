"""Rounding of widths, and bisection to a cost."""

from __future__ import annotations

import math
from collections.abc import Callable

from layerwright.core.errors import BudgetError, InputError

__all__ = ["CostFunction", "check_schedule", "divisible", "nearest_widths", "rounded_width"]

CostFunction = Callable[[list[int]], float]
"""``cost_fn(channels)`` of the network with these widths; it must not fall where a width rises."""


def divisible(channels: int, divisor: int | None) -> int:
    """The multiple of `divisor` nearest to `channels`, at least one of it, and never less than nine tenths of `channels`."""
    if not divisor:
        return channels
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


def nearest_widths(
    widths: Callable[[float], list[int]],
    cost_fn: CostFunction,
    budget: float,
    least: float,
    largest: float,
    tolerance: float,
) -> list[int]:
    """The ``widths(free)`` whose cost is nearest to `budget`, with `free` from `least` to `largest`."""
    if not (math.isfinite(budget) and budget > 0):
        raise BudgetError(f"budget: got {budget}, expected a positive number")
    minimum = cost_fn(widths(least))
    if budget < minimum * (1 - tolerance):
        raise BudgetError(f"budget: got {budget:.6g}, below the least cost {minimum:.6g} of {widths(least)}")
    low, high = least, max(1.0, 2 * least)
    while cost_fn(widths(high)) < budget:
        low, high = high, 2 * high
        if high > 2 * largest:
            raise BudgetError(f"budget: got {budget:.6g}, not reached with widths of {largest:g}")
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if cost_fn(widths(middle)) < budget else (low, middle)
        if widths(low) == widths(high):
            break
    best = min((widths(free) for free in (low, high)), key=lambda found: abs(cost_fn(found) - budget))
    if abs(cost_fn(best) - budget) > tolerance * budget:
        costs = " and ".join(f"{cost_fn(widths(free)):.6g}" for free in (low, high))
        raise BudgetError(
            f"budget: got {budget:.6g}, but the nearest costs are {costs}; raise the tolerance of {tolerance:g}"
        )
    return best


def rounded_width(width: float, divisor: int | None) -> int:
    """A whole width of at least 1."""
    return max(1, divisible(round(width), divisor))


def check_schedule(depth: int, first: float, multiplier: float, divisor: int | None) -> None:
    """Refuse numbers of which no widths can be made."""
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < 2:
        raise InputError(f"depth: got {depth!r}, expected at least 2 blocks")
    if not (math.isfinite(first) and first >= 1):
        raise InputError(f"first: got {first}, expected a width of at least 1")
    if not (math.isfinite(multiplier) and multiplier > 0):
        raise InputError(f"multiplier: got {multiplier}, expected a positive number")
    if divisor is not None and divisor < 1:
        raise InputError(f"divisor: got {divisor}, expected at least 1")
