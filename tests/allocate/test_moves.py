from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwright.allocate.moves import Choice, descend, exchange, improve
from layerwright.allocate.problem import Problem, make_problem
from layerwright.allocate.tree import select
from layerwright.core.cost import Cost
from layerwright.core.option import Option, OptionTable
from layerwright.core.treatment import Drop, Quantize
from oracles.allocate import all_covers, layered_table


def problem_of(table: OptionTable, share: float = 10.0) -> Problem:
    return make_problem(table, {"bytes": share * table.original.bytes, "ms": share * table.original.ms})


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 6), st.integers(1, 3), st.integers(0, 3), st.booleans())
def test_after_any_moves_gains_and_spends_are_those_of_the_new_choice(seed, layers, options, per_block, ties):
    table = layered_table(seed, layers, options, per_block=per_block, ties=ties)
    problem, random = problem_of(table), np.random.default_rng(seed)
    choice = Choice(problem, select(problem.tree, problem.damage)[1])
    index = {id(o): i for i, o in enumerate(table.options)}
    covers = {tuple(sorted(index[id(o)] for o in cover)) for cover in all_covers(table)}
    for _ in range(6):
        possible = np.flatnonzero(np.isfinite(choice.gain))
        move = int(random.choice(possible))
        before, gain, spend = choice.chosen, choice.gain[move], choice.spend[move].copy()
        choice.apply(move)
        assert tuple(choice.chosen.tolist()) in covers
        np.testing.assert_allclose(problem.damage[choice.chosen].sum() - problem.damage[before].sum(), gain, atol=1e-12)
        np.testing.assert_allclose(
            problem.cost[choice.chosen].sum(axis=0) - problem.cost[before].sum(axis=0), spend, atol=1e-6
        )
    fresh = Choice(problem, choice.chosen)
    np.testing.assert_allclose(fresh.gain, choice.gain, atol=1e-12)
    np.testing.assert_allclose(fresh.spend, choice.spend, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(1, 4), st.integers(0, 3), st.booleans())
def test_with_one_limit_a_descent_always_arrives(seed, layers, options, per_block, ties):
    table = layered_table(seed, layers, options, per_block=per_block, ties=ties)
    lowest = select(make_problem(table, {}).tree, np.array([o.cost.bytes for o in table.options]))[0]
    problem = make_problem(table, {"bytes": lowest + table.fixed.bytes})
    choice = Choice(problem, select(problem.tree, problem.damage)[1])
    assert descend(choice)
    assert problem.fits(choice.chosen)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.3, 0.9))
def test_improving_and_exchanging_only_lower_the_damage_and_hold_the_limits(seed, share):
    table = layered_table(seed, 9, 4, per_block=3, ties=True)
    problem = problem_of(table, share)
    choice = Choice(problem, select(problem.tree, problem.cost[:, 0])[1])
    if not descend(choice):
        return
    levels = [problem.damage[choice.chosen].sum()]
    for step in (improve, lambda c: exchange(c, np.zeros(2)), lambda c: exchange(c, c.prices, width=4)):
        step(choice)
        levels.append(problem.damage[choice.chosen].sum())
        assert problem.fits(choice.chosen)
    assert levels == sorted(levels, reverse=True)


def test_a_block_is_split_again_where_there_is_room():
    rows = (
        Option("b.l", (), Cost(bytes=10.0), 0.0),
        Option("b.m", (Quantize(4),), Cost(bytes=2.0), 0.1),
        Option("b", (Drop(),), Cost(), 5.0, ("b.l", "b.m")),
    )
    problem = make_problem(OptionTable(rows), {"bytes": 12.0})
    choice = Choice(problem, np.array([2]))
    improve(choice)
    assert choice.chosen.tolist() == [0, 1]


def test_an_exchange_finds_what_single_moves_do_not():
    rows = (
        Option("a", (), Cost(bytes=10.0), 0.0),
        Option("a", (Quantize(4),), Cost(bytes=2.0), 1.0),
        Option("c", (), Cost(bytes=10.0), 0.0),
        Option("c", (Quantize(4),), Cost(bytes=2.0), 3.0),
    )
    problem = make_problem(OptionTable(rows), {"bytes": 12.0})
    choice = Choice(problem, np.array([0, 3]))
    improve(choice)
    assert choice.chosen.tolist() == [0, 3]
    exchange(choice, np.zeros(1))
    assert choice.chosen.tolist() == [1, 2]
