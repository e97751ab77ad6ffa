from __future__ import annotations

import pytest
import torch

from layerwright.studies.ats import rank_correlation, run, take_random, take_top


def test_quick_form() -> None:
    found = run(quick=True)
    assert found.slug == "ats" and found.seeds == (0,)
    arms = {row["arm"]: row for row in found.table}
    assert arms["cap 64"]["tokens"] > arms["cap 8"]["tokens"]
    assert arms["random, as cap 8"]["tokens"] == pytest.approx(arms["cap 8"]["tokens"], abs=0.5)
    assert arms["cap 8"]["operations saved"] > arms["cap 64"]["operations saved"] > 0
    assert len(found.checks) == 8 and all(check.measured == check.measured for check in found.checks)


def test_choices_to_compare_with() -> None:
    scores = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.5, 0.1, 0.3, 0.1]])
    choose = take_top([2, 1])
    places, there = choose(scores, 4)
    assert places.tolist() == [[1, 3], [0, 2]] and bool(there.all())
    assert choose(scores, 4)[0].tolist() == [[1], [0]]
    drawn = take_random([3], seed=1)(scores, 4)[0]
    assert drawn.shape == (2, 3) and bool((drawn.diff(dim=1) > 0).all())


def test_rank_correlation() -> None:
    x = torch.tensor([1.0, 2.0, 2.0, 3.0])
    assert rank_correlation(x, x) == pytest.approx(1)
    assert rank_correlation(x, -(x**3)) == pytest.approx(-1)
    # Ranks 1, 2.5, 2.5, 4 against 2, 1, 3, 4: covariance 3 over the root of 4.5 times 5.
    assert rank_correlation(x, torch.tensor([2.0, 1.0, 3.0, 4.0])) == pytest.approx(3 / 22.5**0.5)
