"""Slow, obvious versions of what the placement of layers computes at once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

__all__ = ["best_prefix", "best_subset", "roofline"]


def roofline(flops: float, size: float, peak: float, bandwidth: float) -> float:
    """Seconds of one operation."""
    return max(flops / peak, size / bandwidth)


def best_prefix(counts: Sequence[int], high: Sequence[float], low: Sequence[float]) -> float:
    """The best of all splits that move the experts with the fewest tokens, one Python loop at a time."""
    order = sorted(range(len(counts)), key=lambda expert: counts[expert])
    costs = []
    for moved in range(len(counts) + 1):
        on_low = sum(low[counts[e]] for e in order[:moved] if counts[e])
        on_high = sum(high[counts[e]] for e in order[moved:] if counts[e])
        costs.append(max(on_low, on_high))
    return min(costs)


def best_subset(counts: Sequence[int], high: Sequence[float], low: Sequence[float]) -> float:
    """The best of all 2^E subsets."""
    experts = range(len(counts))
    return min(
        max(
            sum(low[counts[e]] for e in chosen if counts[e]),
            sum(high[counts[e]] for e in experts if e not in chosen and counts[e]),
        )
        for size in range(len(counts) + 1)
        for chosen in combinations(experts, size)
    )
