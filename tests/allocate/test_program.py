from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwright.allocate.problem import make_problem
from layerwright.allocate.program import _without_chatter, any_choice, solve_program
from layerwright.core.cost import Cost
from layerwright.core.errors import BudgetError
from layerwright.core.option import Option, OptionTable
from layerwright.core.treatment import Quantize
from oracles.allocate import best, layered_table


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 4), st.integers(0, 3), st.floats(0.2, 1.0))
def test_the_plain_program_equals_brute_force(seed, layers, options, per_block, share):
    table = layered_table(seed, layers, options, per_block=per_block, ties=True)
    limits = {"bytes": share * table.original.bytes, "ms": share * table.original.ms}
    try:
        problem = make_problem(table, limits)
    except BudgetError:
        return
    found = solve_program(problem, problem.damage, np.ones(len(table), dtype=bool))
    expected = best(table, limits)
    assert found.proven
    if found.chosen is None:
        assert np.isinf(expected)
        assert np.isinf(found.bound)
        with pytest.raises(BudgetError, match="cannot be held together"):
            any_choice(problem)
        return
    assert problem.damage[found.chosen].sum() == pytest.approx(expected, rel=2e-6, abs=1e-12)
    assert found.bound <= expected + 1e-9
    assert problem.fits(any_choice(problem))


def test_options_that_are_not_allowed_are_not_taken():
    table = layered_table(1, 4, 4)
    problem = make_problem(table, {"bytes": 0.7 * table.original.bytes})
    free = solve_program(problem, problem.damage, np.ones(len(table), dtype=bool))
    allowed = np.ones(len(table), dtype=bool)
    allowed[free.chosen] = [bool(table.options[i].treatments == ()) for i in free.chosen]
    other = solve_program(problem, problem.damage, allowed)
    assert allowed[other.chosen].all()
    assert problem.damage[other.chosen].sum() > problem.damage[free.chosen].sum()


def test_a_choice_a_hair_over_the_limit_is_refused():
    """One part in a thousand million too much is far below the solver's tolerance."""
    rows = (
        Option("a", (Quantize(8),), Cost(bytes=1e9), 0.0),
        Option("a", (Quantize(4),), Cost(bytes=1e9 - 2), 1.0),
    )
    table = OptionTable(rows)
    for limit, taken in ((1e9, 0), (1e9 - 1, 1)):
        problem = make_problem(table, {"bytes": limit})
        assert solve_program(problem, problem.damage, np.ones(2, dtype=bool)).chosen.tolist() == [taken]


def test_only_the_solvers_lines_are_swallowed(capfd):
    with _without_chatter():
        os.write(1, b"HighsMipSolverData::something\nkept\nHighs again\n")
        os.write(1, b"also kept\n")
    assert capfd.readouterr().out == "kept\nalso kept\n"


def test_the_standard_output_survives_threads_and_errors():
    before = os.fstat(1)
    table = layered_table(5, 30, 6)
    problem = make_problem(table, {"bytes": 0.3 * table.original.bytes, "ms": 0.3 * table.original.ms})
    everything = np.ones(len(table), dtype=bool)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: solve_program(problem, problem.damage, everything).chosen.tolist(), range(8)))
    assert found.count(found[0]) == 8
    with pytest.raises(ZeroDivisionError), _without_chatter():
        raise ZeroDivisionError
    assert (os.fstat(1).st_dev, os.fstat(1).st_ino) == (before.st_dev, before.st_ino)
