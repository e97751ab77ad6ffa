from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerwright.allocate.divisors import divisor_rich_ranks, rich_ranks_between
from layerwright.core.errors import InputError


def count(number: int) -> int:
    return sum(number % d == 0 for d in range(1, number + 1))


@given(st.integers(1, 300), st.integers(0, 60))
def test_the_most_divisors_come_first(low: int, width: int) -> None:
    found = divisor_rich_ranks(low, low + width)
    assert sorted(found) == list(range(low, low + width + 1))
    keys = [(-count(rank), -rank) for rank in found]
    assert keys == sorted(keys)


@given(st.lists(st.integers(1, 200), min_size=1, max_size=9), st.integers(1, 250))
def test_one_rank_for_each_interval(ranks: list[int], largest: int) -> None:
    found = rich_ranks_between(ranks, largest)
    known = sorted({min(rank, largest) for rank in ranks})
    assert list(found) == sorted(set(found))
    assert all(1 <= rank <= largest for rank in found)
    for low, high in pairwise(known):
        inside = [rank for rank in found if low < rank <= high]
        assert len(inside) == 1
        assert all(count(inside[0]) >= count(rank) for rank in range(low + 1, high + 1))
    assert len(found) <= len(known) + 1


def test_one_step_is_added_at_both_ends() -> None:
    assert rich_ranks_between([20, 30, 40], 100) == (20, 30, 36, 48)
    assert rich_ranks_between([20, 30, 40], 40) == (20, 30, 36)
    assert rich_ranks_between([1], 1) == (1,)


def test_bad_input() -> None:
    for low, high in ((0, 3), (5, 4)):
        with pytest.raises(InputError, match="ranks"):
            divisor_rich_ranks(low, high)
    for ranks in ([], [0, 3]):
        with pytest.raises(InputError, match="ranks"):
            rich_ranks_between(ranks, 10)
