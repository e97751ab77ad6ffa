"""Lagrangian relaxation: a price per resource, the proven bound it gives, and choices near the limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from layerwright.allocate.moves import Choice, descend, exchange, improve
from layerwright.allocate.problem import Problem, make_allocation, make_problem
from layerwright.allocate.program import any_choice
from layerwright.allocate.tree import Floats, Integers, select
from layerwright.core.option import Allocation, OptionTable

__all__ = ["Dual", "best_of", "lagrangian", "solve_dual"]

ACCURACY = 1e-9
"""The bound is final when it can rise by no more than this share."""


@dataclass(frozen=True, eq=False)
class Dual:
    """The relaxed problem's solution.

    Attributes:
        prices: ``(resources,)`` damage per unit of each resource.
        bound: no choice that holds the limits damages less.
        choices: the choices that were met on the way, the nearest to the final prices first.
    """

    prices: Floats
    bound: float
    choices: tuple[Integers, ...]


def lagrangian(table: OptionTable, limits: Mapping[str, float], *, seed: int = 0, repairs: int = 8) -> Allocation:
    """Put a price on each resource, take what is best at that price, repair and improve it (Everett, 1963).

    With one limit the price is found by bisection at the crossing of two supporting lines, with several by cutting
    planes. ``damage - bound`` of the result says how far from optimal it can be; with one limit that is less than one
    option's damage.

    Args:
        table: the options.
        limits: resource to the highest total of the whole model.
        seed: not used; the result is the same for every seed.
        repairs: how many of the choices near the final price are repaired and improved.
    """
    problem = make_problem(table, limits)
    dual = solve_dual(problem, problem.damage)
    chosen = best_of(problem, dual, repairs)
    if chosen is None:
        chosen = any_choice(problem)
    damage = float(problem.damage[chosen].sum())
    optimal = damage - dual.bound <= 1e-9 * max(abs(damage), 1e-300)
    return make_allocation(problem, chosen, "lagrangian", optimal=optimal, bound=dual.bound)


def best_of(problem: Problem, dual: Dual, repairs: int) -> Integers | None:
    """The least damaging choice after repairing and improving the first `repairs`; None where no repair succeeds."""
    best: Integers | None = None
    choice = Choice(problem, dual.choices[0])
    for start in dual.choices[:repairs]:
        choice.restart(start)
        if descend(choice, dual.prices):
            improve(choice, dual.prices)
            exchange(choice, dual.prices)
            if best is None or problem.damage[choice.chosen].sum() < problem.damage[best].sum():
                best = choice.chosen
    return best


def solve_dual(problem: Problem, weight: Floats, rounds: int = 200) -> Dual:
    """Prices that maximise the Lagrangian bound of minimising `weight` ``(options,)`` under the limits.

    The bound equals that of the linear relaxation. O(rounds x options).
    """
    cost, limits = problem.cost / problem.scale, problem.limits / problem.scale
    value, start = select(problem.tree, weight)
    if not len(limits) or problem.fits(start):
        return Dual(np.zeros(len(limits)), value, (start,))
    solve = _one_price if len(limits) == 1 else _several_prices
    prices, bound, choices = solve(problem, weight, cost, limits, start, rounds)

    def distance(chosen: Integers) -> float:
        return float(weight[chosen].sum() + prices @ (cost[chosen].sum(axis=0) - limits))

    unique = {chosen.tobytes(): chosen for chosen in choices}
    return Dual(prices / problem.scale, bound, tuple(sorted(unique.values(), key=distance)))


Solved = tuple[Floats, float, list[Integers]]


def _one_price(problem: Problem, weight: Floats, cost: Floats, limits: Floats, start: Integers, rounds: int) -> Solved:
    """The choice too dear and the choice too cheap close in on the price at which both are equally good."""
    column, limit = cost[:, 0], float(limits[0])
    dear, cheap = start, select(problem.tree, column)[1]
    choices, price, bound = [dear, cheap], 0.0, -np.inf
    for _ in range(rounds):
        width = float(column[dear].sum() - column[cheap].sum())
        price = max(float(weight[cheap].sum() - weight[dear].sum()), 0.0) / width
        value, chosen = select(problem.tree, weight + price * column)
        bound = max(bound, value - price * limit)
        line = float(weight[dear].sum() + price * column[dear].sum())
        if value >= line - ACCURACY * (abs(line) + abs(price * limit)):
            break
        choices.append(chosen)
        if problem.fits(chosen):
            cheap = chosen
        else:
            dear = chosen
    return np.array([price]), bound, choices


def _several_prices(
    problem: Problem, weight: Floats, cost: Floats, limits: Floats, start: Integers, rounds: int
) -> Solved:
    """Kelley's cutting planes (1960): every choice met bounds the dual from above by a plane; climb to their summit."""
    from scipy.optimize import linprog

    count = len(limits)
    choices = [start, *(select(problem.tree, column)[1] for column in cost.T)]
    spread = float(weight.max() - weight.min()) or 1.0
    box, prices, bound, unit = 10.0 * spread, np.zeros(count), -np.inf, spread
    for _ in range(rounds):
        slopes = np.array([cost[c].sum(axis=0) - limits for c in choices])
        heights = np.array([weight[c].sum() for c in choices]) / unit
        # The solver's tolerances are absolute: planes far above the summit are scaled down to it.
        tame = np.maximum(np.abs(heights), 1.0)
        summit = linprog(
            c=[*np.zeros(count), -1.0],
            A_ub=np.column_stack([-slopes, np.ones(len(slopes))]) / tame[:, None],
            b_ub=heights / tame,
            bounds=[(0.0, box / unit)] * count + [(None, None)],
            method="highs",
        )
        if summit.x is None:
            break
        trial, top = np.maximum(summit.x[:count], 0.0) * unit, float(summit.x[count]) * unit
        value, chosen = select(problem.tree, weight + cost @ trial)
        if value - trial @ limits > bound:
            prices, bound = trial, float(value - trial @ limits)
            unit = max(abs(bound), 1e-9 * spread)
        known = any(np.array_equal(chosen, c) for c in choices)
        if not known and top - bound > ACCURACY * unit:
            choices.append(chosen)
        elif (trial >= 0.99 * box).any() and box < 1e9 * spread:
            box *= 100.0
        else:
            break
    return prices, bound, choices
