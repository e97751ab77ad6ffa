"""Predictions set right by measured choices."""

from __future__ import annotations

import pytest
import torch

from layerwright.core.calibration import Calibration
from layerwright.core.option import Option, OptionTable
from layerwright.core.treatment import LowRank, Quantize
from layerwright.recipes.settle import correct_kinds, kind_factors, split_for_measuring

Q, L = ("quantize",), ("low_rank", "quantize")


def test_a_single_kind_tells_its_factor_and_a_mixed_choice_the_rest() -> None:
    found = kind_factors([({Q: 1.0, L: 2.0}, 11.5), ({Q: 2.0}, 3.0)])
    assert found == pytest.approx({Q: 1.5, L: 5.0})


def test_factors_stay_within_their_bounds() -> None:
    assert kind_factors([({Q: 1.0}, 1e9), ({L: 1.0}, -1.0)]) == {Q: 20.0, L: 0.5}
    assert kind_factors([({Q: 0.0}, 1.0)]) == {}


def test_only_the_kinds_that_were_measured_change() -> None:
    rows = (
        Option("a", (), damage=0.0, cost=OptionTable(()).fixed),
        Option("a", (Quantize(2),), damage=1.0, cost=OptionTable(()).fixed),
        Option("a", (LowRank(2), Quantize(4)), damage=1.0, cost=OptionTable(()).fixed),
    )
    table = correct_kinds(OptionTable(rows), {L: 3.0})
    assert [o.damage for o in table.options] == [0.0, 1.0, 3.0]


@pytest.mark.parametrize(("batches", "samples", "expected"), [(8, 2, (7, 1)), (8, 100, (6, 2)), (3, 4, (3, 3))])
def test_what_is_measured_on_is_not_what_is_treated_with(batches: int, samples: int, expected: tuple[int, int]) -> None:
    data = Calibration([(torch.full((2, 3), float(i)), torch.zeros(2).long()) for i in range(batches)])
    fitting, unseen = split_for_measuring(data, samples)
    assert (len(fitting), len(unseen)) == expected
    if len(fitting) < batches:
        assert not {float(x[0, 0]) for x, _ in fitting} & {float(x[0, 0]) for x, _ in unseen}
