from __future__ import annotations

import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwright.allocate import ALLOCATORS, integer
from layerwright.core.cost import Cost, total
from layerwright.core.errors import BudgetError
from layerwright.core.option import Allocation, Option, OptionTable
from layerwright.core.treatment import Drop, Quantize
from oracles.allocate import all_covers, best, layered_table


def check(table: OptionTable, limits: dict[str, float], found: Allocation) -> None:
    """A true choice: each layer once, sums right, limits held."""
    covered = [path for option in found.chosen for path in option.covers]
    assert sorted(covered) == sorted(table.layers)
    assert found.cost == total([table.fixed, *(o.cost for o in found.chosen)])
    assert found.damage == pytest.approx(math.fsum(o.damage for o in found.chosen), rel=1e-12, abs=1e-300)
    for name, limit in limits.items():
        assert found.cost.get(name) <= limit * (1 + 1e-9)


tables = st.builds(
    layered_table,
    st.integers(0, 10**6),
    st.integers(1, 6),
    st.integers(1, 4),
    per_block=st.integers(0, 3),
    ties=st.booleans(),
    whole=st.booleans(),
    steep=st.sampled_from([0.2, 1.0, 4.0]),
)
shares = st.dictionaries(st.sampled_from(["bytes", "ms", "flops"]), st.floats(0.02, 1.1), min_size=1, max_size=3)


@settings(max_examples=150, deadline=None)
@given(tables, shares)
def test_equals_brute_force(table, shares):
    limits = {name: share * table.original.get(name) for name, share in shares.items()}
    expected = best(table, limits)
    if math.isinf(expected):
        with pytest.raises(BudgetError, match="reachable minimum"):
            integer(table, limits)
        return
    found = integer(table, limits)
    check(table, limits, found)
    assert found.damage == pytest.approx(expected, rel=2e-6, abs=1e-12)
    assert found.optimal
    assert found.bound is not None
    assert found.bound <= found.damage


@settings(max_examples=40, deadline=None)
@given(tables, st.integers(0, 10**6))
def test_a_limit_met_exactly_is_used(table, pick):
    """The limit is the cost of some choice, to the last byte."""
    covers = list(all_covers(table))
    cover = covers[pick % len(covers)]
    limits = {"bytes": total([table.fixed, *(o.cost for o in cover)]).bytes}
    found = integer(table, limits)
    check(table, limits, found)
    assert found.damage == pytest.approx(best(table, limits), rel=2e-6, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(tables, shares)
def test_no_allocator_beats_it_and_all_of_them_choose_truly(table, shares):
    limits = {name: share * table.original.get(name) for name, share in shares.items()}
    try:
        exact = integer(table, limits)
    except BudgetError:
        for name in ("lagrangian", "greedy", "evolution", "uniform", "clusters"):
            with pytest.raises(BudgetError):
                ALLOCATORS.get(name)(table, limits)
        return
    assert exact.bound is not None
    for name in ("lagrangian", "greedy"):
        found = ALLOCATORS.get(name)(table, limits)
        check(table, limits, found)
        assert found.damage >= exact.damage * (1 - 2e-6) - 1e-12
        if found.bound is not None:
            assert found.bound <= exact.damage + 1e-9 * (1 + abs(exact.damage))
    for name, given_ in (
        ("evolution", {"generations": 3, "population": 8}),
        ("clusters", {"count": 2}),
        ("uniform", {}),
    ):
        try:
            found = ALLOCATORS.get(name)(table, limits, **given_)
        except BudgetError:
            assert name != "evolution"
            continue
        check(table, limits, found)
        assert found.damage >= exact.damage * (1 - 2e-6) - 1e-12


@pytest.mark.parametrize(
    "limits", [{"bytes": 0.3}, {"bytes": 0.3, "ms": 0.29}, {"bytes": 0.3, "ms": 0.3, "flops": 0.3}]
)
@pytest.mark.parametrize("per_block", [0, 7])
def test_a_real_size_is_solved_to_the_gap_and_always_the_same_way(limits, per_block):
    table = layered_table(5, 140, 10, per_block=per_block, ties=True)
    limits = {name: share * table.original.get(name) for name, share in limits.items()}
    found = integer(table, limits)
    check(table, limits, found)
    assert found.optimal
    assert found.bound is not None
    assert found.damage - found.bound <= 2e-6 * found.damage
    again = integer(table, limits)
    assert again.chosen == found.chosen
    assert again.reasons == found.reasons
    for name, near in (("lagrangian", 1.02), ("greedy", 1.1)):
        other = ALLOCATORS.get(name)(table, limits)
        assert found.damage * (1 - 1e-6) <= other.damage <= found.damage * near


def test_a_block_is_dropped_where_that_is_the_best_way_to_save():
    keep = [Option(f"b{b}.l{i}", (), Cost(bytes=10.0), 0.0) for b in range(2) for i in range(2)]
    halve = [Option(f"b{b}.l{i}", (Quantize(8),), Cost(bytes=5.0), 1.0) for b in range(2) for i in range(2)]
    drop = [Option(f"b{b}", (Drop(),), Cost(bytes=-1.0), 1.5 + b, (f"b{b}.l0", f"b{b}.l1")) for b in range(2)]
    table = OptionTable((*keep, *halve, *drop), Cost(bytes=4.0))
    found = integer(table, {"bytes": 24.0})
    assert [str(o.layer) for o in found.chosen] == ["b1.l0", "b1.l1", "b0"]
    assert found.cost.bytes == 23.0
    assert found.damage == 1.5
    assert set(found.reasons) == {"b0", "b0.l0", "b0.l1", "b1.l0", "b1.l1"}


def test_damages_of_very_different_size_are_told_apart():
    """Least damages a million times below the largest one still count."""
    rows = []
    for i in range(12):
        rows += [
            Option(f"l{i}", (), Cost(bytes=16.0), 0.0),
            Option(f"l{i}", (Quantize(8),), Cost(bytes=8.0), 1e-9 * (i + 1)),
            Option(f"l{i}", (Quantize(2),), Cost(bytes=2.0), 10.0),
        ]
    found = integer(OptionTable(tuple(rows)), {"bytes": 12 * 16 - 5 * 8})
    assert found.damage == pytest.approx(1e-9 * (1 + 2 + 3 + 4 + 5), rel=1e-9)


def test_negative_damages_and_ties():
    rows = (
        Option("a", (), Cost(bytes=10.0), 0.0),
        Option("a", (Quantize(8),), Cost(bytes=5.0), -0.5),
        Option("b", (), Cost(bytes=10.0), 0.0),
        Option("b", (Quantize(8),), Cost(bytes=5.0), 0.0),
    )
    for limits in ({}, {"bytes": 100.0}, {"bytes": 15.0}):
        found = integer(OptionTable(rows), limits)
        assert [o.treatments for o in found.chosen] == [(Quantize(8),), (Quantize(8),)]
        assert found.damage == -0.5
        assert found.optimal


def test_limits_that_hold_one_by_one_but_not_together():
    rows = (
        Option("a", (Quantize(4),), Cost(bytes=1.0, ms=9.0), 0.0),
        Option("a", (Quantize(8),), Cost(bytes=9.0, ms=1.0), 0.0),
    )
    with pytest.raises(BudgetError) as error:
        integer(OptionTable(rows, original=Cost(bytes=10.0, ms=10.0)), {"bytes": 5.0, "ms": 5.0})
    assert "cannot be held together" in str(error.value)
    assert "bytes 5 bytes (0.5x) (reachable minimum while the other limits hold: 9 bytes (0.9x))" in str(error.value)


def test_stopping_early_is_admitted():
    table = layered_table(11, 60, 8)
    limits = {"bytes": 0.3 * table.original.bytes, "ms": 0.29 * table.original.ms}
    hasty = integer(table, limits, nodes=0)
    check(table, limits, hasty)
    assert hasty.bound is not None
    assert hasty.optimal == (hasty.damage - hasty.bound <= 1e-6 * hasty.damage)


def test_the_solver_does_not_write_to_the_standard_output(capfd):
    table = layered_table(5, 140, 10)
    for share in (0.21, 0.25, 0.29, 0.33):
        integer(table, {"bytes": share * table.original.bytes, "ms": share * table.original.ms})
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("per_block", [0, 7])
@pytest.mark.parametrize("share", [0.2, 0.25, 0.35])
def test_two_hundred_layers_of_twelve_options_take_under_a_second(share, per_block):
    table = layered_table(3, 200, 12, per_block=per_block)
    limits = {"bytes": share * table.original.bytes}
    begun = time.process_time()
    found = integer(table, limits)
    assert time.process_time() - begun < 1.0
    check(table, limits, found)
    assert found.optimal
