"""The evolutionary allocator: for damages that do not add up, and as a check on the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from layerwright.allocate.multipliers import solve_dual
from layerwright.allocate.problem import Problem, make_allocation, make_problem
from layerwright.allocate.program import any_choice
from layerwright.allocate.tree import Booleans, Floats, Integers, select
from layerwright.core.errors import InputError
from layerwright.core.option import Allocation, Option, OptionTable

__all__ = ["evolution"]

SPLIT = -1
"""The gene of a node that leaves the decision to its children."""


def evolution(
    table: OptionTable,
    limits: Mapping[str, float],
    *,
    seed: int = 0,
    population: int = 64,
    generations: int = 200,
    mutation: float = 0.02,
    tournament: int = 3,
    elite: int = 4,
    objective: Callable[[tuple[Option, ...]], float] | None = None,
) -> Allocation:
    """Choices that are selected, crossed, mutated and brought back under the limits, generation after generation.

    Parents win tournaments, a child takes each node's gene from either parent, and a few genes are drawn anew. A child
    over a limit gives up options for cheaper ones in random order until it fits (Dong et al., EMQ, 2023, search the
    same way). O(generations x population x nodes); memory: ``population x (nodes x (resources + 4) + 4 x
    options)`` numbers.

    Args:
        table: the options.
        limits: resource to the highest total of the whole model.
        seed: of everything random.
        population: choices per generation, at least 2.
        generations: how many.
        mutation: probability that a node's gene is drawn anew, 0 to 1; at least one node of a child changes on average.
        tournament: choices that are drawn for each parent; the best of them is taken.
        elite: best choices that live on unchanged.
        objective: measures a choice where damages do not add up; the sum of the damages if None. Called once for every
            distinct choice.

    Raises:
        InputError: a setting out of its range.
        BudgetError: no choice holds the limits; says what can be reached.
    """
    if population < 2 or generations < 0 or not 0 <= mutation <= 1 or tournament < 1 or not 0 < elite < population:
        raise InputError(
            f"evolution: got population={population}, generations={generations}, mutation={mutation}, "
            f"tournament={tournament}, elite={elite}; expected population above elite above 0, mutation from 0 to 1"
        )
    problem, random = make_problem(table, limits), np.random.default_rng(seed)
    pool = _Pool(problem, objective, {})
    genes = pool.repair(_start(pool, population, random), random)
    values = pool.measure(genes)
    if not np.isfinite(values).any():
        genes[0] = pool.encode(any_choice(problem))
        values = pool.measure(genes)
    rate = max(mutation, 1.0 / len(problem.tree))
    for _ in range(generations):
        order = np.argsort(values, kind="stable")
        rivals = random.integers(0, population, (2, population - elite, tournament))
        parents = np.take_along_axis(rivals, np.argmin(values[rivals], axis=2)[..., None], axis=2)[..., 0]
        mixed = random.random((population - elite, genes.shape[1])) < 0.5
        children = np.where(mixed, genes[parents[0]], genes[parents[1]])
        # Most children change a gene or two, a few change many: single changes alone get stuck.
        rates = rate ** (1.0 - random.random((len(children), 1)) ** 3)
        drawn = random.random(children.shape) < rates
        children = pool.repair(np.where(drawn, pool.draw(len(children), random), children), random)
        genes = np.concatenate([genes[order[:elite]], children])
        values = np.concatenate([values[order[:elite]], pool.measure(children)])
    best = genes[int(np.argmin(values))]
    return make_allocation(problem, pool.decode(best[None])[0], "evolution")


def _start(pool: _Pool, count: int, random: np.random.Generator) -> Integers:
    """Genes ``(count, nodes)`` of priced choices: half of them near the Lagrangian prices, half at any price."""
    problem = pool.problem
    near, spread = solve_dual(problem, problem.damage).prices, float(np.ptp(problem.damage)) or 1.0
    genes = []
    for i in range(count):
        far = spread * 10.0 ** random.uniform(-6, 2, len(near)) / problem.scale
        prices = near * 10.0 ** random.normal(0.0, 0.2, len(near)) if i % 2 == 0 else far
        noise = np.exp(random.normal(0.0, 0.3, len(problem.damage)))
        genes.append(pool.encode(select(problem.tree, problem.damage * noise + problem.cost @ prices)[1]))
    return np.array(genes)


@dataclass(frozen=True, eq=False)
class _Pool:
    """Genes of many choices at once: ``(choices, nodes)``, an option of the node or `SPLIT`."""

    problem: Problem
    objective: Callable[[tuple[Option, ...]], float] | None
    known: dict[bytes, float]

    def encode(self, chosen: Integers) -> Integers:
        """Genes of one choice; nodes that it does not reach get their preferred option."""
        tree = self.problem.tree
        genes = tree.order[tree.starts].copy()
        genes[tree.node[chosen]] = chosen
        for i in chosen.tolist():
            v = int(tree.parent[tree.node[i]])
            while v >= 0:
                genes[v] = SPLIT
                v = int(tree.parent[v])
        return genes

    def active(self, genes: Integers) -> Booleans:
        """Which genes are expressed: those whose ancestors all split."""
        tree = self.problem.tree
        on = np.zeros(genes.shape, dtype=bool)
        for level in reversed(tree.levels):
            up = tree.parent[level]
            on[:, level] = (up < 0) | (on[:, up] & (genes[:, up] == SPLIT))
        return on

    def decode(self, genes: Integers) -> list[Integers]:
        """The chosen options of each row."""
        on = self.active(genes) & (genes != SPLIT)
        return [np.sort(row[used]) for row, used in zip(genes, on, strict=True)]

    def draw(self, count: int, random: np.random.Generator) -> Integers:
        """Random genes ``(count, nodes)``; a split is one more option of a node that can be split."""
        tree = self.problem.tree
        sizes = np.diff(np.append(tree.starts, len(tree.order)))
        place = (random.random((count, len(tree))) * (sizes + tree.splits)).astype(np.intp)
        return np.where(place == sizes, SPLIT, tree.order[tree.starts + np.minimum(place, sizes - 1)])

    def totals(self, genes: Integers) -> Floats:
        """``(choices, resources)`` costs."""
        on = self.active(genes) & (genes != SPLIT)
        return np.asarray((self.problem.cost[genes] * on[..., None]).sum(axis=1))

    def repair(self, genes: Integers, random: np.random.Generator) -> Integers:
        """Swap expressed genes for the cheapest of their node, in random order, until the limits hold or all are."""
        problem, tree = self.problem, self.problem.tree
        if not problem.resources:
            return genes
        excess = self.totals(genes) - problem.limits
        over = np.flatnonzero((excess > problem.slack).any(axis=1))
        if not len(over):
            return genes
        some, need = genes[over], excess[over]
        # The price of a resource is how far this choice exceeds it.
        price = np.maximum(need, 0.0) / problem.scale**2
        weight = price @ problem.cost.T
        ordered = weight[:, tree.order]
        least = np.minimum.reduceat(ordered, tree.starts, axis=1)[:, tree.node[tree.order]]
        first = np.where(ordered == least, np.arange(len(tree.order)), len(tree.order))
        cheapest = tree.order[np.minimum.reduceat(first, tree.starts, axis=1)]
        swap = self.active(some) & (some != SPLIT)
        saved = (problem.cost[some] - problem.cost[cheapest]) * swap[..., None]
        order = np.argsort(random.random(some.shape), axis=1)
        running = np.cumsum(np.take_along_axis(saved, order[..., None], axis=1), axis=1)
        before = np.concatenate([np.zeros_like(running[:, :1]), running[:, :-1]], axis=1)
        wanted = (before < (need - problem.slack)[:, None, :]).any(axis=2)
        chosen = np.zeros_like(swap)
        np.put_along_axis(chosen, order, wanted, axis=1)
        genes = genes.copy()
        genes[over] = np.where(chosen & swap, cheapest, some)
        return genes

    def measure(self, genes: Integers) -> Floats:
        """What each choice is worth ``(choices,)``, lower is better; infinite over a limit."""
        problem = self.problem
        on = self.active(genes) & (genes != SPLIT)
        fits = (self.totals(genes) - problem.limits <= problem.slack).all(axis=1)
        if self.objective is None:
            return np.where(fits, (problem.damage[genes] * on).sum(axis=1), np.inf)
        values = np.full(len(genes), np.inf)
        for row in np.flatnonzero(fits).tolist():
            chosen = np.sort(genes[row][on[row]])
            key = chosen.tobytes()
            if key not in self.known:
                self.known[key] = float(self.objective(tuple(problem.options[i] for i in chosen.tolist())))
            values[row] = self.known[key]
        return values
