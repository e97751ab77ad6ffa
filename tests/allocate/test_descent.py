from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwright.allocate import greedy
from layerwright.core.cost import Cost
from layerwright.core.errors import BudgetError
from layerwright.core.option import Option, OptionTable
from layerwright.core.treatment import Quantize
from oracles.allocate import best, layered_table


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 7), st.integers(2, 4), st.floats(0.1, 1.0))
def test_with_one_limit_and_no_blocks_it_is_within_one_option_of_the_optimum(seed, layers, options, share):
    table = layered_table(seed, layers, options)
    limits = {"bytes": share * table.original.bytes}
    try:
        found = greedy(table, limits)
    except BudgetError:
        return
    exact = best(table, limits)
    assert exact - 1e-12 <= found.damage <= exact + max(o.damage for o in table.options) + 1e-12


def test_it_takes_the_convex_hull_and_not_the_next_smaller_option():
    # From 8 bits the step to 4 saves little at great damage, the step to 2 saves much more for a little more.
    rows = (
        Option("a", (Quantize(8),), Cost(bytes=8.0), 0.0),
        Option("a", (Quantize(4),), Cost(bytes=7.0), 4.0),
        Option("a", (Quantize(2),), Cost(bytes=2.0), 5.0),
        Option("c", (Quantize(8),), Cost(bytes=8.0), 0.0),
        Option("c", (Quantize(2),), Cost(bytes=2.0), 9.0),
    )
    found = greedy(OptionTable(rows), {"bytes": 10.0})
    assert [o.cost.bytes for o in found.chosen] == [2.0, 8.0]


def test_it_finds_a_choice_where_single_moves_are_stuck():
    """From the least damage every move that helps one limit breaks the other; a choice exists all the same."""
    rows = (
        Option("a", (Quantize(8),), Cost(bytes=5.0, ms=5.0), 0.0),
        Option("a", (Quantize(4),), Cost(bytes=1.0, ms=7.0), 1.0),
        Option("c", (Quantize(8),), Cost(bytes=5.0, ms=5.0), 0.0),
        Option("c", (Quantize(4),), Cost(bytes=6.0, ms=3.0), 1.0),
    )
    found = greedy(OptionTable(rows), {"bytes": 8.0, "ms": 10.0})
    assert found.cost.bytes == 7.0
    assert found.cost.ms == 10.0


def test_a_budget_out_of_reach():
    with pytest.raises(BudgetError, match="reachable minimum is"):
        greedy(layered_table(0, 4, 3), {"bytes": 1.0})
