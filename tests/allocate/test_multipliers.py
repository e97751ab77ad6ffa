from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from layerwright.allocate import lagrangian
from layerwright.allocate.multipliers import solve_dual
from layerwright.allocate.problem import incidence, make_problem
from layerwright.allocate.tree import select
from layerwright.core.errors import BudgetError
from oracles.allocate import best, layered_table


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(2, 12),
    st.integers(2, 4),
    st.integers(0, 3),
    st.lists(st.floats(0.15, 0.9), min_size=1, max_size=3),
)
def test_the_bound_is_that_of_the_linear_relaxation(seed, layers, options, per_block, shares):
    table = layered_table(seed, layers, options, per_block=per_block, ties=True)
    limits = {n: s * table.original.get(n) for n, s in zip(("bytes", "ms", "flops"), shares, strict=False)}
    try:
        problem = make_problem(table, limits)
    except BudgetError:
        return
    cover = incidence(problem.tree)
    relaxed = linprog(
        problem.damage,
        A_ub=(problem.cost / problem.scale).T,
        b_ub=problem.limits / problem.scale,
        A_eq=cover,
        b_eq=np.ones(cover.shape[0]),
        bounds=(0, 1),
    )
    dual = solve_dual(problem, problem.damage)
    if relaxed.status == 2:  # the limits do not hold together: any bound is right
        return
    assert dual.bound == pytest.approx(relaxed.fun, rel=1e-5, abs=1e-7)
    priced = select(problem.tree, problem.damage + problem.cost @ dual.prices)[0] - dual.prices @ problem.limits
    assert dual.bound == pytest.approx(priced, rel=1e-7, abs=1e-9)


def test_without_a_binding_limit_prices_are_zero():
    table = layered_table(1, 5, 3)
    dual = solve_dual(make_problem(table, {"bytes": 1e9, "ms": 1e9}), make_problem(table, {}).damage)
    assert dual.prices.tolist() == [0.0, 0.0]
    found = lagrangian(table, {"bytes": 1e9})
    assert found.damage == 0.0
    assert found.optimal


def test_the_gap_is_reported_and_true():
    table = layered_table(2, 6, 4)
    limits = {"bytes": 0.4 * table.original.bytes}
    found = lagrangian(table, limits)
    exact = best(table, limits)
    assert found.bound is not None
    assert found.bound <= exact <= found.damage
    # With one limit the relaxation takes at most one option in part.
    assert found.bound >= exact - max(o.damage for o in table.options)


def test_the_same_every_time_whatever_the_seed():
    table = layered_table(3, 30, 6, per_block=3)
    limits = {"bytes": 0.3 * table.original.bytes, "ms": 0.35 * table.original.ms}
    assert lagrangian(table, limits, seed=1) == lagrangian(table, limits, seed=2)
