"""Ranks that can be shared out: hardware that works on several at once needs their divisors."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from layerwright.core.errors import InputError
from layerwright.score.dataflow import divisors

__all__ = ["divisor_rich_ranks", "rich_ranks_between"]


def divisor_rich_ranks(lo: int, hi: int) -> tuple[int, ...]:
    """The whole numbers from `lo` to `hi`, those with the most divisors first, of equals the larger first.

    The first one is the rank to take: the parallelism factors of an engine must divide it (Yu and Bouganis, 2023).

    Raises:
        InputError: a range that is empty or starts below 1.
    """
    if not 1 <= lo <= hi:
        raise InputError(f"ranks: got {lo} to {hi}, expected a range that starts at 1 or later")
    return tuple(sorted(range(lo, hi + 1), key=lambda rank: (-len(divisors(rank)), -rank)))


def rich_ranks_between(ranks: Iterable[int], largest: int) -> tuple[int, ...]:
    """For every interval between neighbours among `ranks` the rank with the most divisors, rising.

    One more interval, as wide as its neighbour, is added at both ends. An interval does not contain its lower end, and
    none goes beyond 1 and `largest`.

    Raises:
        InputError: no rank, or one below 1.
    """
    known = sorted({min(rank, largest) for rank in ranks})
    if not known or known[0] < 1:
        raise InputError(f"ranks: got {known}, expected at least one, each 1 or more")
    steps = [b - a for a, b in pairwise(known)] or [1]
    ends = [max(known[0] - steps[0], 0), *known, min(known[-1] + steps[-1], largest)]
    return tuple(sorted({divisor_rich_ranks(a + 1, b)[0] for a, b in pairwise(ends) if b > a}))
