"""An option table and its limits as arrays: the set partition that every allocator solves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from layerwright.allocate.tree import Booleans, Floats, Integers, Tree, build_tree, select
from layerwright.core.cost import RESOURCES, total
from layerwright.core.errors import BudgetError, InputError, unknown_name
from layerwright.core.option import Allocation, Option, OptionTable

if TYPE_CHECKING:
    from scipy.sparse import csr_array

__all__ = ["Problem", "describe_amount", "incidence", "make_allocation", "make_problem", "minimum", "undominated"]

TOLERANCE = 1e-12
"""Share of a limit by which a floating-point sum may exceed it."""


@dataclass(frozen=True, eq=False)
class Problem:
    """A table and its limits as arrays.

    Attributes:
        table: where it came from.
        resources: names of the limited resources, fields of `Cost`.
        limits: ``(resources,)`` what the chosen options may cost together; `table.fixed` is already taken off.
        slack: ``(resources,)`` the rounding error that a sum of costs is allowed.
        scale: ``(resources,)`` largest minus smallest total that a choice can reach, to compare resources; above 0.
        damage: ``(options,)``, may be negative: a scorer that knows better clamps it.
        cost: ``(options, resources)``.
        bytes: ``(options,)`` breaks ties, fewer first.
        tree: which options exclude which.
    """

    table: OptionTable
    resources: tuple[str, ...]
    limits: Floats
    slack: Floats
    scale: Floats
    damage: Floats
    cost: Floats
    bytes: Floats
    tree: Tree

    @property
    def options(self) -> tuple[Option, ...]:
        """The rows of the table."""
        return self.table.options

    def excess(self, chosen: Integers) -> Floats:
        """``(resources,)`` by how much a choice exceeds each limit; negative where there is room."""
        return np.asarray(self.cost[chosen].sum(axis=0) - self.limits)

    def fits(self, chosen: Integers) -> bool:
        """Whether a choice holds every limit."""
        return not bool((self.excess(chosen) > self.slack).any())


def make_problem(table: OptionTable, limits: Mapping[str, float]) -> Problem:
    """Arrays of `table` under `limits` (resource name to the highest total of the whole model; infinity is no limit).

    Raises:
        InputError: no options, a damage or cost that is not finite, options that overlap, an unknown resource.
        BudgetError: a limit below the smallest total that any choice reaches; says that total.
    """
    for name, value in limits.items():
        if name not in RESOURCES:
            raise unknown_name("resource", name, RESOURCES, "the limits")
        if math.isnan(value):
            raise BudgetError(f"{name}: the limit is not a number; give the highest total of the whole model")
    names = tuple(name for name in RESOURCES if limits.get(name, math.inf) < math.inf)
    tree, damage, everything = _arrays(table)
    cost = everything[:, [RESOURCES.index(name) for name in names]]
    fixed = np.array([table.fixed.get(name) for name in names])
    bounds = np.array([float(limits[name]) for name in names])
    low = np.array([select(tree, column)[0] for column in cost.T])
    high = np.array([-select(tree, -column)[0] for column in cost.T])
    problem = Problem(
        table=table,
        resources=names,
        limits=bounds - fixed,
        slack=TOLERANCE * (np.abs(bounds) + np.abs(fixed)),
        scale=np.where(high > low, high - low, 1.0),
        damage=damage,
        cost=cost,
        bytes=everything[:, RESOURCES.index("bytes")],
        tree=tree,
    )
    short = low > problem.limits + problem.slack
    if short.any():
        parts = [
            f"{name} limit {describe_amount(table, name, bounds[r])} is below what can be reached: the reachable "
            f"minimum is {describe_amount(table, name, low[r] + fixed[r])}"
            for r, name in enumerate(names)
            if short[r]
        ]
        raise BudgetError(f"budget: {'; '.join(parts)}; raise the budget or offer cheaper options")
    return problem


def _arrays(table: OptionTable) -> tuple[Tree, Floats, Floats]:
    """The tree, damages ``(options,)`` and costs ``(options, len(RESOURCES))`` of a table."""
    if not table.options:
        raise InputError("options: the table is empty; score at least one layer first")
    damage = np.array([option.damage for option in table.options], dtype=np.float64)
    rows = [[getattr(option.cost, name) for name in RESOURCES] for option in table.options]
    cost = np.array(rows, dtype=np.float64)
    for what, good in (("damage", np.isfinite(damage)), ("cost", np.isfinite(cost).all(axis=1))):
        if not good.all():
            bad = list(dict.fromkeys(table.options[i].layer for i in np.flatnonzero(~good).tolist()))
            shown = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
            raise InputError(f"{what}: not a finite number for {shown}; score these layers again or leave them out")
    return build_tree([option.covers for option in table.options], cost[:, RESOURCES.index("bytes")]), damage, cost


def minimum(table: OptionTable, resource: str) -> float:
    """The smallest total of `resource` (a field of `Cost`) that a choice can reach, `table.fixed` included.

    Each block is dropped where that is cheaper than the cheapest options of its layers.
    """
    if resource not in RESOURCES:
        raise unknown_name("resource", resource, RESOURCES)
    tree, _, cost = _arrays(table)
    return select(tree, cost[:, RESOURCES.index(resource)])[0] + table.fixed.get(resource)


def describe_amount(table: OptionTable, resource: str, amount: float) -> str:
    """An amount as itself, as a share of the untouched model, and for bytes as bits per planned weight."""
    original = table.original.get(resource)
    weights = table.original.params - table.fixed.params
    unit = {"bytes": " bytes", "ms": " ms", "flops": " FLOPs", "params": " parameters"}.get(
        resource, " bytes per token"
    )
    text = f"{amount:,.3f}".rstrip("0").rstrip(".") + unit
    notes = [f"{amount / original:.4g}x"] if original > 0 else []
    if resource == "bytes" and weights > 0 and amount > table.fixed.bytes:
        notes.append(f"{8 * (amount - table.fixed.bytes) / weights:.4g} bits per planned weight")
    return f"{text} ({', '.join(notes)})" if notes else text


def incidence(tree: Tree) -> csr_array:
    """Sparse ``(rows, options)`` matrix of zeros and ones; each row's options exclude each other and one must be taken.

    Layers that are covered by the same options share a row.
    """
    from scipy.sparse import csr_array

    rows: list[Integers] = []
    for lowest in np.unique(tree.lowest).tolist():
        chain, v = [], lowest
        while v >= 0:
            chain.append(tree.options_of(v))
            v = int(tree.parent[v])
        rows.append(np.concatenate(chain))
    columns = np.concatenate(rows)
    pointers = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    return csr_array((np.ones(len(columns)), columns, pointers), shape=(len(rows), len(tree.node)))


def undominated(problem: Problem, chunk: int = 256) -> Booleans:
    """``(options,)`` False where another option of the same layers damages no more and costs no more of any resource.

    Leaving those out keeps an optimal choice. Memory: ``chunk x options of one node x (resources + 1)`` booleans.
    """
    keys = np.column_stack([problem.damage, problem.cost])
    keep = np.ones(len(keys), dtype=bool)
    for v in range(len(problem.tree)):
        own = problem.tree.options_of(v)
        # Sorted by all keys, a dominating option stands before the ones it dominates; of copies the smallest is first.
        own = own[np.lexsort((problem.bytes[own], *keys[own].T[::-1]))]
        for begin in range(0, len(own), chunk):
            some = own[begin : begin + chunk]
            earlier = np.arange(len(own)) < np.arange(begin, begin + len(some))[:, None]
            better = (keys[own] <= keys[some][:, None, :]).all(axis=2)
            keep[some[(better & earlier).any(axis=1)]] = False
    return keep


def make_allocation(
    problem: Problem,
    chosen: Integers,
    method: str,
    *,
    optimal: bool = False,
    bound: float | None = None,
) -> Allocation:
    """The `Allocation` of a choice, with predicted totals and a reason for every layer."""
    from layerwright.allocate.reasons import explain

    order = np.sort(chosen)
    picked = tuple(problem.options[i] for i in order.tolist())
    cost = total([problem.table.fixed, *(option.cost for option in picked)])
    damage = math.fsum(option.damage for option in picked)
    # The same sum in another order may differ in its last digit.
    bound = None if bound is None else min(bound, damage)
    return Allocation(picked, cost, damage, explain(problem, order), method, optimal, bound)
