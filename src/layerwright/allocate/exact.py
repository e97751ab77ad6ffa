"""The exact allocator: an integer program, made small by a bound before it is solved."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from layerwright.allocate.multipliers import Dual, best_of, solve_dual
from layerwright.allocate.problem import Problem, make_allocation, make_problem, undominated
from layerwright.allocate.program import any_choice, solve_program
from layerwright.allocate.tree import Booleans, node_values
from layerwright.core.option import Allocation, OptionTable

__all__ = ["integer"]


def integer(
    table: OptionTable,
    limits: Mapping[str, float],
    *,
    seed: int = 0,
    gap: float = 1e-6,
    nodes: int = 20_000,
) -> Allocation:
    """The least damaging choice under all limits, by an integer program (AdaQuant, Hubara et al., 2021).

    The Lagrangian bound and a repaired Lagrangian choice come first. An option that cannot stand in any better choice
    is then left out (reduced-cost fixing), which mostly leaves HiGHS a few hundred variables of ten thousand.

    Args:
        table: the options.
        limits: resource to the highest total of the whole model.
        seed: not used; the result is the same for every seed.
        gap: relative gap that counts as optimal.
        nodes: branch-and-bound nodes after which the best choice so far is returned, with `optimal` False.

    Raises:
        BudgetError: no choice holds the limits; says what can be reached.
    """
    problem = make_problem(table, limits)
    weight = problem.damage
    dual = solve_dual(problem, weight)
    chosen = best_of(problem, dual, repairs=8)
    if chosen is None:
        chosen = any_choice(problem)
    damage, bound = float(weight[chosen].sum()), dual.bound
    proven = damage - bound <= gap * abs(damage)
    if not proven:
        allowed = undominated(problem) & _useful(problem, dual, damage)
        allowed[chosen] = True
        # Among equals the smaller choice: too weak to outweigh any difference in damage that matters.
        tie = 1e-9 * (damage - bound) / float(np.abs(problem.bytes).sum() or 1.0)
        solution = solve_program(problem, weight + tie * problem.bytes, allowed, gap=gap, nodes=nodes)
        if solution.chosen is not None and weight[solution.chosen].sum() <= damage:
            chosen, damage = solution.chosen, float(weight[solution.chosen].sum())
        # What was left out damages more than the repaired choice, so it cannot lower the bound below that.
        bound, proven = max(bound, min(solution.bound, damage)), solution.proven
    return make_allocation(problem, chosen, "integer", optimal=proven, bound=bound)


def _useful(problem: Problem, dual: Dual, damage: float) -> Booleans:
    """``(options,)`` whether a choice with that option can still be as good as `damage`, by the Lagrangian bound.

    Forcing an option costs its reduced weight, and that of splitting every node above it.
    """
    tree, weight = problem.tree, problem.damage + problem.cost @ dual.prices
    best, _, split = node_values(tree, weight)
    forced = np.zeros(len(tree))
    for level in reversed(tree.levels[:-1]):
        inner = level[tree.parent[level] >= 0]
        up = tree.parent[inner]
        forced[inner] = forced[up] + split[up] - best[up]
    bound = best[tree.roots].sum() - dual.prices @ problem.limits
    lowest = bound + forced[tree.node] + weight - best[tree.node]
    return np.asarray(lowest <= damage + 1e-9 * (abs(damage) + abs(bound)))
