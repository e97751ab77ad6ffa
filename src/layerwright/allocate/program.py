"""The integer program: one variable per option, solved by HiGHS, with answers checked in exact sums."""

from __future__ import annotations

import ctypes
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from layerwright.allocate.problem import Problem, describe_amount, incidence
from layerwright.allocate.tree import Booleans, Floats, Integers, Tree
from layerwright.core.errors import BudgetError

__all__ = ["Solution", "any_choice", "solve_program"]

LARGEST = 1e3
"""Largest number in a row that the solver sees; its tolerances are absolute, 1e-6 and below."""

RETRIES = 20
"""How often a choice that exceeds a limit by less than the solver's tolerance is ruled out before giving up."""


_SWAP = threading.Lock()


@dataclass(frozen=True, eq=False)
class Solution:
    """An answer of the solver.

    Attributes:
        chosen: a choice that holds the limits; None where none was found.
        bound: no choice among the allowed options weighs less; infinite where there is none.
        proven: `bound` is within the gap of the choice, or there is proven to be none.
    """

    chosen: Integers | None
    bound: float
    proven: bool


def solve_program(
    problem: Problem,
    weight: Floats,
    allowed: Booleans,
    *,
    gap: float = 1e-6,
    nodes: int = 20_000,
    links: tuple[Any, Any, Any] | None = None,
) -> Solution:
    """Minimise the summed `weight` ``(options,)`` over choices of `allowed` ``(options,)`` options.

    min w.y  subject to  A y = 1 (each layer once),  C y <= limits,  y in {0, 1}

    Args:
        problem: the arrays.
        weight: what is minimised.
        allowed: options that may be used; the others are left out.
        gap: relative gap at which the search stops.
        nodes: branch-and-bound nodes after which the search stops; a count and not a time, so that the same
            input gives the same answer.
        links: more binary variables and rows: ``(number of variables, sparse matrix over [options, variables], (lower
            bounds, upper bounds))``.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array, hstack

    used = np.flatnonzero(allowed)
    cover = incidence(problem.tree)
    extra, rows, sides = links if links is not None else (0, None, (0.0, 0.0))
    objective, constant = _reduce(problem.tree, cover, weight, allowed)
    scale = float(np.abs(objective[used]).max(initial=0.0)) / LARGEST or 1.0

    def widen(matrix: Any) -> Any:
        return hstack([csr_array(matrix), csr_array((matrix.shape[0], extra))], format="csr") if extra else matrix

    constraints = [LinearConstraint(widen(cover[:, used]), 1.0, 1.0)]
    for column, limit in zip(problem.cost.T, problem.limits, strict=True):
        spend, base = _reduce(problem.tree, cover, column, allowed)
        unit = float(np.abs(spend[used]).max(initial=0.0)) / LARGEST or 1.0
        constraints.append(LinearConstraint(widen(spend[used][None] / unit), -np.inf, (limit - base) / unit))
    if rows is not None:
        columns = np.concatenate([used, len(weight) + np.arange(extra)])
        constraints.append(LinearConstraint(rows[:, columns], sides[0], sides[1]))
    bound = -np.inf
    for _ in range(RETRIES):
        with _without_chatter():
            result = milp(
                np.concatenate([objective[used] / scale, np.zeros(extra)]),
                integrality=np.ones(len(used) + extra, dtype=np.intp),
                bounds=Bounds(0.0, 1.0),
                constraints=constraints,
                options={"mip_rel_gap": gap, "node_limit": nodes, "presolve": True},
            )
        if result.mip_dual_bound is not None:
            bound = max(bound, float(result.mip_dual_bound) * scale + constant)
        if result.x is None:
            return Solution(None, np.inf if result.status == 2 else bound, result.status == 2)
        picked = result.x[: len(used)] > 0.5
        if problem.fits(used[picked]):
            return Solution(used[picked], bound, result.status == 0)
        # Within the solver's tolerance, yet over a limit: this one choice is ruled out and nothing else.
        row = np.concatenate([picked.astype(float), np.zeros(extra)])[None]
        constraints.append(LinearConstraint(row, -np.inf, picked.sum() - 1.0))
    return Solution(None, bound, False)


def _reduce(tree: Tree, cover: Any, values: Floats, allowed: Booleans) -> tuple[Floats, float]:
    """`values` less what every choice pays in any case, and that: smaller numbers leave the solver more accuracy."""
    rows = np.unique(tree.lowest)
    least = np.minimum.reduceat(np.where(allowed, values, np.inf)[tree.order], tree.starts)[rows]
    least = np.where(np.isfinite(least), least, 0.0)
    return values - cover.T @ least, float(least.sum())


@contextmanager
def _without_chatter() -> Iterator[None]:
    """Take HiGHS's stray diagnostics out of the standard output, which may be a pipe that expects JSON.

    HiGHS 1.12 prints a line of its own even when told to be silent. What anybody else prints meanwhile is passed on.
    The descriptor belongs to the whole process, so only one thread at a time may swap it.
    """
    flush_c = ctypes.CDLL(None).fflush if os.name == "posix" else lambda _: None
    with _SWAP, tempfile.TemporaryFile() as caught:
        try:
            saved = os.dup(1)
        except OSError:  # no standard output to keep clean
            yield
            return
        try:
            flush_c(None)
            os.dup2(caught.fileno(), 1)
            yield
        finally:
            flush_c(None)
            os.dup2(saved, 1)
            caught.seek(0)
            lines = [line for line in caught.read().splitlines(keepends=True) if not line.startswith(b"Highs")]
            if lines:
                os.write(saved, b"".join(lines))
            os.close(saved)


def any_choice(problem: Problem) -> Integers:
    """Some choice that holds every limit.

    Raises:
        BudgetError: there is none, or none was found: the limits can be held one by one but not together.
    """
    everything = np.ones(len(problem.damage), dtype=bool)
    solution = solve_program(problem, np.zeros(len(problem.damage)), everything, gap=1.0)
    if solution.chosen is not None:
        return solution.chosen
    cannot = "cannot be held together" if solution.proven else "were not found to hold together"
    each = " and ".join(_each(problem, everything))
    raise BudgetError(f"budget: the limits {cannot}: {each}; raise one of them or offer cheaper options")


def _each(problem: Problem, everything: Booleans) -> list[str]:
    """Says what each limited resource can reach while the other limits hold."""
    parts = []
    for r, name in enumerate(problem.resources):
        limits = problem.limits.copy()
        limits[r] = np.inf
        free = replace(problem, limits=limits)
        best = solve_program(free, problem.cost[:, r], everything).chosen
        fixed = problem.table.fixed.get(name)
        limit = describe_amount(problem.table, name, problem.limits[r] + fixed)
        reach = "nothing" if best is None else describe_amount(problem.table, name, problem.cost[best, r].sum() + fixed)
        parts.append(f"{name} {limit} (reachable minimum while the other limits hold: {reach})")
    return parts
