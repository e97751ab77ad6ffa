from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerwright.allocate.width_schedule import Widths, proportional_widths, width_schedule

BERT = Widths(12, 3072, 768)


def test_one_head_per_step_of_bert_base() -> None:
    path = width_schedule(BERT, proportional_widths(BERT, 8))
    assert path == [Widths(11, 2816, 704), Widths(10, 2560, 640), Widths(9, 2304, 576), Widths(8, 2048, 512)]


def test_proportional_targets_are_those_of_the_paper() -> None:
    assert [proportional_widths(BERT, a) for a in (2, 6)] == [Widths(2, 512, 128), Widths(6, 1536, 384)]
    assert proportional_widths(Widths(4, 64), 1) == Widths(1, 16, None)
    assert proportional_widths(Widths(12, 3, 2), 1) == Widths(1, 1, 1)


@given(st.data(), st.integers(1, 9))
def test_steps_never_rise_and_end_at_the_target(data: Any, steps: int) -> None:
    full = Widths(*(data.draw(st.integers(1, 40)) for _ in range(3)))
    target = Widths(*(data.draw(st.integers(1, top)) for top in (full.heads, full.neurons, full.rank)))
    path = width_schedule(full, target, steps)
    assert len(path) == steps
    assert path[-1] == target
    for name in ("heads", "neurons", "rank"):
        values = [getattr(full, name), *(getattr(widths, name) for widths in path)]
        falls = [a - b for a, b in pairwise(values)]
        assert min(falls) >= 0
        assert max(falls) - min(falls) <= 1


def test_nothing_to_remove_is_one_step() -> None:
    assert width_schedule(BERT, Widths(12, 100)) == [Widths(12, 100, None)]
    assert width_schedule(Widths(4, 8), Widths(2, 8)) == [Widths(3, 8), Widths(2, 8)]


@pytest.mark.parametrize(
    ("target", "name"),
    [(Widths(13, 10), "heads"), (Widths(2, 4000), "neurons"), (Widths(2, 10, 800), "rank")],
)
def test_targets_above_what_there_is(target: Widths, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: got"):
        width_schedule(BERT, target)


@pytest.mark.parametrize("values", [(0, 1, 1), (1, 0, 1), (1, 1, 0), (-1, 1, 1), (1.5, 2, 3), (True, 2, 3)])
def test_widths_below_one(values: Any) -> None:
    with pytest.raises(ValueError, match=r"(heads|neurons|rank): got"):
        Widths(*values)


def test_other_bad_input() -> None:
    with pytest.raises(ValueError, match="rank"):
        width_schedule(Widths(4, 8), Widths(2, 4, 3))
    with pytest.raises(ValueError, match="steps"):
        width_schedule(BERT, BERT, 0)
    with pytest.raises(ValueError, match="heads"):
        proportional_widths(BERT, 13)
