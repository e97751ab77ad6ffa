"""The trade-off between one resource and the damage."""

from __future__ import annotations

from typing import Any

import numpy as np

from layerwright.allocate.problem import make_problem, minimum
from layerwright.allocate.tree import select
from layerwright.core.errors import BudgetError, InputError
from layerwright.core.option import Allocation, OptionTable

__all__ = ["pareto"]


def pareto(
    table: OptionTable,
    resource: str,
    points: int = 20,
    allocator: str = "integer",
    *,
    seed: int = 0,
    **settings: Any,
) -> list[Allocation]:
    """The best choices from the smallest total of `resource` to the total at which the damage is least.

    The limits are equally spaced. A choice that another one beats, or equals, in both is left out, so that along the
    list the cost rises and the damage falls; there are at most `points`.

    Args:
        table: the options.
        resource: field of `Cost`.
        points: number of limits, at least 2.
        allocator: name of the allocator that solves each of them.
        seed: passed on.
        settings: passed on.

    Raises:
        InputError: an unknown resource or allocator, or fewer than 2 points.
        BudgetError: the allocator holds none of the limits.
    """
    from layerwright.allocate import ALLOCATORS

    if points < 2:
        raise InputError(f"points: got {points}, expected at least 2")
    solve = ALLOCATORS.get(allocator)
    low = minimum(table, resource)
    free = make_problem(table, {})
    chosen = select(free.tree, free.damage)[1]
    high = sum(table.options[i].cost.get(resource) for i in chosen.tolist()) + table.fixed.get(resource)
    found: list[Allocation] = []
    problem: BudgetError | None = None
    for limit in np.linspace(low, max(low, high), points).tolist():
        try:
            found.append(solve(table, {resource: limit}, seed=seed, **settings))
        except BudgetError as error:  # a restricted allocator need not reach the minimum
            problem = error
    if not found and problem is not None:
        raise problem
    front: list[Allocation] = []
    for one in sorted(found, key=lambda a: (a.cost.get(resource), a.damage)):
        if not front or one.damage < front[-1].damage:
            front.append(one)
    return front
