from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwright.score.token_errors import edit_distance, token_error_rate
from oracles.transducer import edit_distance as slow_distance

labels = st.lists(st.integers(1, 3), max_size=6)


@given(labels, labels)
@settings(max_examples=150, deadline=None)
def test_edit_distance(a: list[int], b: list[int]) -> None:
    assert edit_distance(a, b) == edit_distance(b, a) == slow_distance(a, b)


def test_rate() -> None:
    assert token_error_rate([[1, 2], [], [3]], [[1, 3], [2], [3]]) == 2 / 4
    assert token_error_rate([[1, 1, 1]], [[2]]) == 3
    with pytest.raises(ValueError, match="transcripts"):
        token_error_rate([[1]], [])
    with pytest.raises(ValueError, match="no labels"):
        token_error_rate([[1]], [[]])
