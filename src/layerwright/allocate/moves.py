"""Local changes of a choice: another option for a node, one option for a whole block, or a block split up again."""

from __future__ import annotations

import numpy as np

from layerwright.allocate.problem import Problem
from layerwright.allocate.tree import Floats, Integers, Tree, best_splits

__all__ = ["Choice", "descend", "exchange", "improve"]

ROUNDING = 1e-12
"""Share of the largest damage, or of a resource's range, below which a change is rounding."""


class Choice:
    """A choice that changes move by move, with what every possible move would change.

    Moves 0 to ``options - 1`` take one option in place of whatever covers its layers now. The moves after them split a
    node: into its choice of least damage, and of least cost in each limited resource. A move costs one update of the
    nodes above and below it.

    Attributes:
        gain: ``(moves,)`` change of damage; infinite where a move is impossible now.
        spend: ``(moves, resources)`` change of cost.
        prices: ``(resources,)`` the highest damage per unit that a descent has paid so far.
        root: ``(moves,)`` the root above; moves under different roots do not touch each other.
    """

    def __init__(self, problem: Problem, chosen: Integers) -> None:
        self.problem = problem
        tree = problem.tree
        self._below = _below(tree.parent, tree.levels)
        splits = [part for weight in (problem.damage, *problem.cost.T) for part in best_splits(tree, weight)]
        nodes = np.tile(np.flatnonzero(tree.splits), 1 + len(problem.resources))
        self._parts = [np.array([i]) for i in range(len(problem.damage))] + splits
        self._node = np.concatenate([tree.node, nodes])
        self._damage = np.concatenate([problem.damage, [problem.damage[part].sum() for part in splits]])
        totals = np.array([problem.cost[part].sum(axis=0) for part in splits])
        self._cost = np.concatenate([problem.cost, totals.reshape(len(splits), len(problem.resources))])
        self.root = _roots(tree)[self._node]
        by_node = np.argsort(self._node, kind="stable")
        self._moves = np.split(by_node, np.searchsorted(self._node[by_node], np.arange(1, len(tree))))
        self.restart(chosen)

    def restart(self, chosen: Integers) -> None:
        """Go to another choice."""
        problem, tree = self.problem, self.problem.tree
        self._taken = np.full(len(tree), -1, dtype=np.intp)
        self._taken[tree.node[chosen]] = chosen
        self.prices = np.zeros(len(problem.resources))
        # What stands at or below each node now: its damage, its cost, and how many options.
        now = np.zeros((len(tree), 2 + len(problem.resources)))
        now[tree.node[chosen]] = np.column_stack([problem.damage[chosen], problem.cost[chosen], np.ones(len(chosen))])
        for level in tree.levels[:-1]:
            inner = level[tree.parent[level] >= 0]
            np.add.at(now, tree.parent[inner], now[inner])
        now = now[self._node]
        possible = now[:, -1] > 0
        self.gain = np.where(possible, self._damage - now[:, 0], np.inf)
        self.spend = np.where(possible[:, None], self._cost - now[:, 1:-1], 0.0)

    @property
    def chosen(self) -> Integers:
        """The options that are chosen now, sorted."""
        return np.sort(self._taken[self._taken >= 0])

    def apply(self, move: int) -> None:
        """Make a move whose `gain` is finite."""
        tree, node, part = self.problem.tree, int(self._node[move]), self._parts[move]
        above, v = [node], int(tree.parent[node])
        while v >= 0:
            above.append(v)
            v = int(tree.parent[v])
        self._taken[self._below[node]] = -1
        self._taken[tree.node[part]] = part
        self._refresh(np.concatenate([self._below[node], above[1:]]).astype(np.intp))

    def _refresh(self, nodes: Integers) -> None:
        """Bring the moves of `nodes` up to date."""
        for v in nodes.tolist():
            moves, inside = self._moves[v], self._taken[self._below[v]]
            now = inside[inside >= 0]
            if len(now):
                self.gain[moves] = self._damage[moves] - self._damage[now].sum()
                self.spend[moves] = self._cost[moves] - self._cost[now].sum(axis=0)
            else:
                self.gain[moves], self.spend[moves] = np.inf, 0.0


def _roots(tree: Tree) -> Integers:
    """The root above each node."""
    root = np.arange(len(tree))
    for level in reversed(tree.levels):
        inner = level[tree.parent[level] >= 0]
        root[inner] = root[tree.parent[inner]]
    return root


def _below(parent: Integers, levels: tuple[Integers, ...]) -> list[Integers]:
    """Each node with everything under it."""
    lists: list[list[int]] = [[v] for v in range(len(parent))]
    for level in levels:
        for v in level.tolist():
            if parent[v] >= 0:
                lists[int(parent[v])] += lists[v]
    return [np.array(nodes, dtype=np.intp) for nodes in lists]


def descend(choice: Choice, prices: Floats | None = None) -> bool:
    """Make moves of least damage per saving until every limit holds; False where no move saves any more.

    A saving is the sum over the exceeded limits of the saved share of what can be saved at all, as far as it is needed.
    With one limit this walks down the lower convex hull of every node. A move that breaks a limit which holds is not
    made. With `prices`
    ``(resources,)`` the damage counts what a move spends at these prices.
    """
    problem = choice.problem
    while True:
        excess = problem.excess(choice.chosen)
        over = excess > problem.slack
        if not over.any():
            return True
        saving = -(choice.spend[:, over] / problem.scale[over]).sum(axis=1)
        allowed = (saving > ROUNDING) & np.isfinite(choice.gain)
        held = ~over
        allowed &= (choice.spend[:, held] + excess[held] <= problem.slack[held]).all(axis=1)
        if not allowed.any():
            return False
        candidates = np.flatnonzero(allowed)
        # What a move saves beyond a limit is worth nothing.
        useful = np.minimum(saving[candidates], float((excess[over] / problem.scale[over]).sum()))
        harm = choice.gain[candidates]
        if prices is not None:
            harm = harm + np.maximum(choice.spend[candidates], -excess) @ prices
        rate = harm / useful
        best = int(np.argmin(rate))
        choice.prices[over] = np.maximum(choice.prices[over], rate[best] / problem.scale[over])
        choice.apply(int(candidates[best]))


def improve(choice: Choice, prices: Floats | None = None) -> None:
    """Make the move that lowers the damage most while every limit holds, until there is none. Limits must hold.

    With `prices` ``(resources,)`` the order is that of the damage plus what a move spends at these prices.
    """
    problem, rounding = choice.problem, _rounding(choice.problem)
    while True:
        room = problem.slack - problem.excess(choice.chosen)
        allowed = (choice.gain < -rounding) & (choice.spend <= room).all(axis=1)
        if not allowed.any():
            return
        candidates = np.flatnonzero(allowed)
        harm = choice.gain[candidates]
        choice.apply(int(candidates[np.argmin(harm if prices is None else harm + choice.spend[candidates] @ prices)]))


def exchange(choice: Choice, prices: Floats, width: int = 256) -> None:
    """Make the best pair of moves while every limit holds, until no pair lowers the damage. Limits must hold.

    Only the `width` moves that cost least at `prices` ``(resources,)`` are paired. Memory: ``width**2 x resources``.
    """
    problem, rounding = choice.problem, _rounding(choice.problem)
    while True:
        priced = choice.gain + choice.spend @ prices
        some = np.argsort(priced, kind="stable")[:width]
        some = some[np.isfinite(priced[some])]
        room = problem.slack - problem.excess(choice.chosen)
        gain, spend, root = choice.gain[some], choice.spend[some], choice.root[some]
        both = gain[:, None] + gain[None, :]
        fits = (spend[:, None, :] + spend[None, :, :] <= room).all(axis=2) & (root[:, None] != root[None, :])
        both[~fits] = np.inf
        best = int(np.argmin(both))
        if not both.size or both.flat[best] >= -rounding:
            return
        for move in some[list(divmod(best, len(some)))].tolist():
            choice.apply(move)


def _rounding(problem: Problem) -> float:
    return ROUNDING * float(np.abs(problem.damage).max(initial=0.0))
