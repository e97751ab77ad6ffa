from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwright.allocate.problem import incidence, make_problem, minimum, undominated
from layerwright.core.cost import Cost
from layerwright.core.errors import BudgetError, InputError
from layerwright.core.option import Option, OptionTable
from layerwright.core.treatment import Drop, Quantize
from oracles.allocate import all_covers, best, layered_table, least


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 3), st.integers(0, 3), st.booleans())
def test_minimum_is_the_least_of_all_covers(seed, layers, options, per_block, ties):
    table = layered_table(seed, layers, options, per_block=per_block, ties=ties)
    for resource in ("bytes", "ms", "params", "flops"):
        assert minimum(table, resource) == pytest.approx(least(table, resource), abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 3), st.integers(0, 3), st.booleans())
def test_incidence_rows_hold_once_exactly_for_covers(seed, layers, options, per_block, ties):
    table = layered_table(seed, layers, options, per_block=per_block, ties=ties)
    matrix = incidence(make_problem(table, {}).tree).toarray()
    index = {id(o): i for i, o in enumerate(table.options)}
    covers = {frozenset(index[id(o)] for o in cover) for cover in all_covers(table)}
    count = 0
    for bits in range(2 ** min(len(table), 14)):
        chosen = [i for i in range(len(table)) if bits >> i & 1]
        if (matrix[:, chosen].sum(axis=1) == 1).all():
            count += 1
            assert frozenset(chosen) in covers
    if len(table) <= 14:
        assert count == len(covers)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(2, 5), st.floats(0.1, 1.0))
def test_leaving_dominated_options_out_keeps_the_optimum(seed, layers, options, share):
    table = layered_table(seed, layers, options, steep=0.1)
    limits = {"bytes": share * table.original.bytes, "ms": share * table.original.ms}
    try:
        keep = undominated(make_problem(table, limits), chunk=2)
    except BudgetError:
        return
    thinned = replace(table, options=tuple(o for o, kept in zip(table.options, keep, strict=True) if kept))
    assert best(thinned, limits) == best(table, limits)


def test_of_two_equal_options_one_is_kept_and_it_is_the_smaller():
    rows = [Option("a", (Quantize(b),), Cost(bytes=n, ms=1.0), 1.0) for b, n in ((4, 20.0), (3, 10.0), (5, 10.0))]
    problem = make_problem(OptionTable(tuple(rows)), {"ms": 5.0})
    assert undominated(problem).tolist() == [False, True, False]


def test_a_budget_out_of_reach_says_what_can_be_reached():
    table = OptionTable(
        (
            Option("a", (), Cost(bytes=100.0, params=50), 0.0),
            Option("a", (Quantize(4),), Cost(bytes=25.0, params=50), 0.5),
        ),
        fixed=Cost(bytes=20.0, params=10),
        original=Cost(bytes=120.0, params=60),
    )
    with pytest.raises(BudgetError) as error:
        make_problem(table, {"bytes": 30.0})
    assert "bytes limit 30 bytes (0.25x" in str(error.value)
    assert "reachable minimum is 45 bytes (0.375x, 4 bits per planned weight)" in str(error.value)


def test_every_limit_out_of_reach_is_named():
    table = layered_table(0, 3, 2)
    with pytest.raises(BudgetError, match=r"bytes limit .* ms limit "):
        make_problem(table, {"bytes": 1.0, "ms": 1.0})


def test_a_dropped_blocks_negative_cost_counts_for_the_minimum():
    rows = (
        Option("b.l", (), Cost(bytes=10.0), 0.0),
        Option("b", (Drop(),), Cost(bytes=-3.0), 1.0, ("b.l",)),
    )
    assert minimum(OptionTable(rows, Cost(bytes=5.0)), "bytes") == 2.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_damage_that_is_not_finite_names_the_layer(bad):
    table = OptionTable((Option("good", (), Cost(), 0.0), Option("ill.layer", (), Cost(), bad)))
    with pytest.raises(InputError, match=r"damage: not a finite number for ill\.layer"):
        make_problem(table, {})


def test_a_cost_that_is_not_finite_names_the_layer():
    table = OptionTable((Option("ill.layer", (), Cost(ms=math.nan), 0.0),))
    with pytest.raises(InputError, match=r"cost: not a finite number for ill\.layer"):
        minimum(table, "bytes")


def test_negative_damage_is_allowed():
    table = OptionTable((Option("a", (), Cost(), 0.0), Option("a", (Quantize(8),), Cost(), -0.1)))
    assert make_problem(table, {}).damage.tolist() == [0.0, -0.1]


def test_other_bad_input():
    table = layered_table(0, 2, 2)
    with pytest.raises(InputError, match="did you mean bytes"):
        make_problem(table, {"byte": 1e9})
    with pytest.raises(InputError, match="unknown resource"):
        minimum(table, "joules")
    with pytest.raises(BudgetError, match="not a number"):
        make_problem(table, {"bytes": math.nan})
    with pytest.raises(InputError, match="empty"):
        make_problem(OptionTable(()), {})


def test_an_infinite_limit_is_none():
    assert make_problem(layered_table(0, 2, 2), {"bytes": math.inf, "ms": 1e9}).resources == ("ms",)


def test_a_limit_that_is_met_exactly_holds():
    table = layered_table(3, 5, 3)
    problem = make_problem(table, {"bytes": minimum(table, "bytes")})
    cheapest = np.array([min(problem.tree.options_of(v), key=lambda i: problem.cost[i, 0]) for v in range(5)])
    assert problem.fits(cheapest)
