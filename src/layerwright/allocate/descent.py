"""The greedy allocator: down the convex hull, one move at a time."""

from __future__ import annotations

from collections.abc import Mapping

from layerwright.allocate.moves import Choice, descend, exchange, improve
from layerwright.allocate.problem import make_allocation, make_problem
from layerwright.allocate.program import any_choice
from layerwright.allocate.tree import select
from layerwright.core.option import Allocation, OptionTable

__all__ = ["greedy"]


def greedy(table: OptionTable, limits: Mapping[str, float], *, seed: int = 0) -> Allocation:
    """Start from the least damage, take the move of least damage per saving until the budget holds, then improve.

    With one limit this walks down the lower convex hulls of all layers together (Sinha and Zoltners, 1979), so that it
    ends within one move of the optimum: little where moves are small, more where whole blocks may go. In the end moves
    and pairs of moves that use up what is left are made. O(moves made x options).

    Args:
        table: the options.
        limits: resource to the highest total of the whole model.
        seed: not used; the result is the same for every seed.

    Raises:
        BudgetError: no choice holds the limits; says what can be reached.
    """
    problem = make_problem(table, limits)
    choice = Choice(problem, select(problem.tree, problem.damage)[1])
    if not descend(choice):
        # Several limits can leave single moves stuck where a choice still exists.
        choice = Choice(problem, any_choice(problem))
    improve(choice)
    exchange(choice, choice.prices)
    return make_allocation(problem, choice.chosen, "greedy")
