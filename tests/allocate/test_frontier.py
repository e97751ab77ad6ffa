from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwright.allocate import minimum, pareto
from layerwright.core.cost import Cost
from layerwright.core.errors import BudgetError, InputError
from layerwright.core.option import Option, OptionTable
from layerwright.core.treatment import Quantize
from oracles.allocate import best, layered_table


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["integer", "lagrangian", "greedy"]), st.integers(0, 3))
def test_cost_rises_and_damage_falls_from_one_end_to_the_other(seed, allocator, per_block):
    table = layered_table(seed, 5, 4, per_block=per_block)
    front = pareto(table, "bytes", 8, allocator)
    assert len(front) <= 8
    for low, high in itertools.pairwise(front):
        assert low.cost.bytes < high.cost.bytes
        assert low.damage > high.damage
    assert front[0].cost.bytes == pytest.approx(minimum(table, "bytes"))
    assert front[-1].damage == pytest.approx(best(table, {}), abs=1e-12)


def test_each_point_is_optimal():
    table = layered_table(5, 6, 4)
    for point in pareto(table, "ms", 5):
        assert point.damage == pytest.approx(best(table, {"ms": point.cost.ms}), rel=2e-6, abs=1e-12)


def test_a_restricted_allocator_starts_where_it_can():
    rows = [
        Option(n, (Quantize(b),), Cost(bytes=float(b)), 4.0**-b)
        for n, bits in (("a", (8, 4, 2)), ("b", (8, 4)))
        for b in bits
    ]
    front = pareto(OptionTable(tuple(rows)), "bytes", 5, "uniform")
    assert [a.cost.bytes for a in front] == [8.0, 16.0]


def test_settings_and_seed_reach_the_allocator():
    table = layered_table(5, 12, 4)
    a, b = (pareto(table, "bytes", 3, "evolution", seed=s, generations=1, population=8) for s in (0, 0))
    assert a == b
    with pytest.raises(TypeError):
        pareto(table, "bytes", 3, "integer", generations=1)


def test_bad_input():
    table = layered_table(0, 2, 2)
    with pytest.raises(InputError, match="points: got 1"):
        pareto(table, "bytes", 1)
    with pytest.raises(InputError, match="unknown resource"):
        pareto(table, "watts")
    with pytest.raises(InputError, match="did you mean integer"):
        pareto(table, "bytes", 3, "interger")
    rows = (Option("a", (Quantize(4),), Cost(), 0.0), Option("b", (Quantize(8),), Cost(), 0.0))
    with pytest.raises(BudgetError, match="no single treatment"):
        pareto(OptionTable(rows), "bytes", 3, "uniform")
