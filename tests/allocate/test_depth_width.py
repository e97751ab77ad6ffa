from __future__ import annotations

import math
import statistics

import pytest

from layerwright.allocate.depth_width import DepthWidthAllocator, compare_with_best
from layerwright.allocate.equal_parameters import Shape
from layerwright.core.errors import BudgetError, InputError, NotFiniteError

BASE = 84_934_656


def test_rule_of_the_objective() -> None:
    masked = DepthWidthAllocator("masked", BASE).allocate()
    supervised = DepthWidthAllocator("supervised", BASE).allocate()
    assert masked.shape.name == "48x384" and "deeper and narrower" in masked.reason
    assert supervised.shape.name == "12x768"
    assert [shape.name for shape, _ in supervised.ranked] == ["12x768", "6x1088", "48x384"]


def test_a_probe_decides() -> None:
    seen: list[str] = []

    def probe(shape: Shape) -> float:
        seen.append(shape.name)
        return {3: 0.7, 6: 0.9, 12: 0.88}[shape.layers]

    allocator = DepthWidthAllocator("masked", 385_000, probe, (3, 6, 12), heads=4, tolerance=0.05)
    plan = allocator.allocate()
    assert seen == ["3x104", "6x72", "12x52"]
    assert plan.shape.name == "6x72"
    assert [shape.layers for shape, _ in plan.ranked] == [6, 12, 3]
    assert plan.to_data()["ranked"][1]["probe"] == 0.88
    near = DepthWidthAllocator("masked", 385_000, probe, (3, 6, 12), heads=4, tolerance=0.05, margin=0.25).allocate()
    assert near.shape.layers == 3 and "3 are within 0.25" in near.reason


def test_comparison_is_paired_over_seeds() -> None:
    # Seeds differ by far more than shapes do.
    values = {"a": [1.0, 2.0, 3.0], "b": [1.1, 2.12, 3.11], "c": [1.5, 1.2, 3.5]}
    rows = compare_with_best(values, higher_is_better=False)
    assert [row.name for row in rows] == ["a", "c", "b"]
    best, c, b = rows
    assert best.worse == 0 and best.within_noise is True
    assert b.worse == pytest.approx(0.11) and b.within_noise is False
    assert b.interval == pytest.approx(4.3026527 * statistics.stdev([0.1, 0.12, 0.11]) / math.sqrt(3))
    assert c.within_noise is True
    best, *others = compare_with_best(values)
    assert best.name == "b" and [row.name for row in others] == ["c", "a"]


def test_one_seed_tells_nothing_of_noise() -> None:
    best, other = compare_with_best({"a": [1.0], "b": [2.0]})
    assert best.name == "b" and best.within_noise is True
    assert other.within_noise is None and other.interval is None and other.to_data()["within_noise"] is None


def test_bad_input() -> None:
    with pytest.raises(InputError, match="unknown objective 'maskd'; did you mean masked"):
        DepthWidthAllocator("maskd")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="margin: got -1"):
        DepthWidthAllocator(margin=-1)
    with pytest.raises(BudgetError, match="feasible: none"):
        DepthWidthAllocator(budget_params=1000).allocate()
    with pytest.raises(NotFiniteError, match="probe: gave nan"):
        DepthWidthAllocator(budget_params=BASE, probe=lambda _: float("nan")).allocate()
    with pytest.raises(InputError, match="expected as many for each"):
        compare_with_best({"a": [1.0], "b": []})
    with pytest.raises(NotFiniteError, match="leave failed shapes out"):
        compare_with_best({"a": [1.0], "b": [float("nan")]})
