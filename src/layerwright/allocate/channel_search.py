"""Widths of a convnet found at random under a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from layerwright.allocate._channels import CostFunction, check_schedule, nearest_widths, rounded_width
from layerwright.core.errors import BudgetError, InputError

__all__ = ["ChannelDesign", "ChannelSpace", "mean_profile", "search_channels"]


@dataclass(frozen=True)
class ChannelSpace:
    """Widths ``a f(i) + b`` with `f` piecewise linear from 0 at the first block to 1 at the last, never falling.

    Attributes:
        depth: blocks, at least 2.
        cost_fn: must not fall where a width rises.
        pieces: straight pieces of `f`, at least 1.
        first: range from which the first width `b` is drawn; `a` follows from the budget.
        divisor: widths are multiples of it.
        tolerance: share by which the budget may be missed.

    Raises:
        InputError: a number outside its range.
    """

    depth: int
    cost_fn: CostFunction
    pieces: int = 4
    first: tuple[float, float] = (8.0, 32.0)
    divisor: int | None = None
    tolerance: float = 0.01

    def __post_init__(self) -> None:
        check_schedule(self.depth, self.first[0], 1.0, self.divisor)
        if not 1 <= self.pieces < self.depth:
            raise InputError(f"pieces: got {self.pieces}, expected 1 to {self.depth - 1}, one less than the blocks")
        if self.first[1] < self.first[0]:
            raise InputError(f"first: got {self.first}, expected the smaller width first")
        if not 0 < self.tolerance < 1:
            raise InputError(f"tolerance: got {self.tolerance}, expected a share in (0, 1)")


@dataclass(frozen=True)
class ChannelDesign:
    """One trial of `search_channels`.

    Attributes:
        channels: widths of the blocks.
        cost: by the space's `cost_fn`.
        value: what `evaluate` gave; higher is better.
        profile: `f` at each block, from 0 to 1.
    """

    channels: tuple[int, ...]
    cost: float
    value: float
    profile: tuple[float, ...]


def search_channels(
    space: ChannelSpace, budget: float, evaluate: Callable[[list[int]], float], n: int, seed: int = 0
) -> list[ChannelDesign]:
    """`n` random designs of equal cost, the best first; `mean_profile` says how the best ones grow.

    Draws that no slope brings to the budget (because the first width alone is beyond it) are drawn again, up to twenty times
    each. Source: Han et al., 2021, arXiv 2007.00992, who find the best tenth nearly linear.

    Args:
        budget: what each design costs, within the space's tolerance.
        evaluate: ``evaluate(channels)``, such as an accuracy after short training.
        n: at least 1.

    Raises:
        InputError: no trials, or values that are not finite.
        BudgetError: no draw can be brought to the budget; the message says why for the last one.
    """
    if n < 1:
        raise InputError(f"n: got {n}, expected at least 1 trial")
    draw = torch.Generator().manual_seed(seed)
    designs: list[ChannelDesign] = []
    for _ in range(n):
        profile, channels = _draw_design(space, budget, draw)
        value = float(evaluate(channels))
        if not math.isfinite(value):
            raise InputError(f"evaluate: got {value} for {channels}, expected a finite number")
        designs.append(ChannelDesign(tuple(channels), space.cost_fn(channels), value, profile))
    return sorted(designs, key=lambda design: -design.value)


def mean_profile(designs: Sequence[ChannelDesign], share: float = 0.1) -> tuple[float, ...]:
    """Mean of the profiles of the best `share` of `designs` (at least one), from 0 at the first block to 1 at the last.

    Raises:
        InputError: no designs, or a share outside (0, 1].
    """
    if not designs or not 0 < share <= 1:
        raise InputError(f"share: got {share} of {len(designs)} designs, expected (0, 1] of at least one")
    best = sorted(designs, key=lambda design: -design.value)[: max(1, round(share * len(designs)))]
    return tuple(math.fsum(column) / len(best) for column in zip(*(design.profile for design in best), strict=True))


def _draw_design(space: ChannelSpace, budget: float, draw: torch.Generator) -> tuple[tuple[float, ...], list[int]]:
    for attempt in range(20):
        inner = 1 + torch.randperm(space.depth - 2, generator=draw)[: space.pieces - 1].sort().values
        places = [0, *inner.tolist(), space.depth - 1]
        heights = [0.0, *torch.rand(space.pieces - 1, generator=draw).sort().values.tolist(), 1.0]
        profile = _between(places, heights)
        low, high = space.first
        first = low + (high - low) * float(torch.rand((), generator=draw))

        def widths(a: float, profile: tuple[float, ...] = profile, first: float = first) -> list[int]:
            return [rounded_width(first + a * height, space.divisor) for height in profile]

        try:
            return profile, nearest_widths(widths, space.cost_fn, budget, 0.0, 65536.0, space.tolerance)
        except BudgetError:
            if attempt == 19:
                raise
    raise AssertionError


def _between(places: Sequence[int], heights: Sequence[float]) -> tuple[float, ...]:
    """The piecewise linear function through ``(places, heights)`` at 0, 1, ..., the last place."""
    values = [heights[0]]
    for left, right, low, high in zip(places, places[1:], heights, heights[1:], strict=False):
        values += [low + (high - low) * step / (right - left) for step in range(1, right - left + 1)]
    return tuple(values)
