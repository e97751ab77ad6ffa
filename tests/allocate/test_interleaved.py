"""The published lists, and the rule behind them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerwright.allocate.interleaved import interleaved_keep
from layerwright.core.errors import InputError


def test_published_lists() -> None:
    assert interleaved_keep(12) == [0, 1, 2, 4, 6, 8, 10, 11]
    assert interleaved_keep(24) == [0, 1, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 23]
    assert interleaved_keep(6) == [0, 1, 2, 4, 5]


@given(st.integers(1, 60), st.integers(0, 6), st.integers(0, 6), st.integers(1, 5))
def test_ends_stay_and_gaps_are_short(depth: int, first: int, last: int, stride: int) -> None:
    kept = interleaved_keep(depth, first, last, stride)
    assert kept == sorted(set(kept))
    assert set(range(min(first, depth))) | set(range(max(depth - last, 0), depth)) <= set(kept)
    assert all(b - a <= stride for a, b in pairwise(kept))
    assert interleaved_keep(depth, first, last, 1) == list(range(depth))


@pytest.mark.parametrize("settings", [{"num_layers": 0}, {"stride": 0}, {"keep_first": -1}, {"keep_last": True}])
def test_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(settings))):
        interleaved_keep(**{"num_layers": 12, **settings})
