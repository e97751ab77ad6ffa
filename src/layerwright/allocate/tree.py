"""Which options exclude which: the sets of layers that options cover, as a tree, and the best choice for one weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from layerwright.core.errors import InputError

__all__ = ["Tree", "best_splits", "build_tree", "first_of_least", "node_values", "select"]

Floats = NDArray[np.float64]
Integers = NDArray[np.intp]
Booleans = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Tree:
    """The distinct sets of layers that options cover; a set's children are the largest sets inside it.

    A choice that covers each layer once either takes one option of a node or splits it into its children.

    Attributes:
        node: ``(options,)`` node of each option.
        order: ``(options,)`` options sorted by node, in the caller's order of preference within a node.
        starts: ``(nodes,)`` where each node begins in `order`.
        parent: ``(nodes,)``, -1 at a root.
        splits: ``(nodes,)`` whether the children cover the node, so that it can be split.
        levels: nodes by height, the childless first.
        lowest: ``(layers,)`` the smallest node around each layer.
    """

    node: Integers
    order: Integers
    starts: Integers
    parent: Integers
    splits: Booleans
    levels: tuple[Integers, ...]
    lowest: Integers

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def roots(self) -> Integers:
        """Nodes inside no other."""
        return np.flatnonzero(self.parent < 0)

    def options_of(self, node: int) -> Integers:
        """Options of one node."""
        stop = self.starts[node + 1] if node + 1 < len(self) else len(self.order)
        return self.order[self.starts[node] : stop]


def build_tree(covers: Sequence[Sequence[str]], preference: Floats) -> Tree:
    """The tree of ``covers[option]``; among equals, a smaller `preference` ``(options,)`` comes first.

    Raises:
        InputError: an option covers a layer twice, or two options overlap without one containing the other.
    """
    numbers: dict[str, int] = {}
    sets: dict[frozenset[str], int] = {}
    node = np.empty(len(covers), dtype=np.intp)
    for i, paths in enumerate(covers):
        for path in paths:
            numbers.setdefault(path, len(numbers))
        key = frozenset(paths)
        if len(key) != len(paths):
            raise InputError(f"covers: an option names a layer twice: {', '.join(paths)}")
        node[i] = sets.setdefault(key, len(sets))
    parent, splits, height, lowest = _nest(list(sets), numbers)
    order = np.lexsort((np.arange(len(covers)), preference, node))
    starts = np.searchsorted(node[order], np.arange(len(sets)))
    levels = tuple(np.flatnonzero(height == h) for h in range(int(height.max(initial=0)) + 1))
    return Tree(node, order, starts, parent, splits, levels, lowest)


def _nest(sets: list[frozenset[str]], numbers: dict[str, int]) -> tuple[Integers, Booleans, Integers, Integers]:
    """Parent, whether the children cover it, and height of each set; the lowest set around each layer."""
    parent, height = np.full(len(sets), -1, dtype=np.intp), np.zeros(len(sets), dtype=np.intp)
    splits = np.zeros(len(sets), dtype=bool)
    top, lowest = np.full(len(numbers), -1, dtype=np.intp), np.full(len(numbers), -1, dtype=np.intp)
    for v in sorted(range(len(sets)), key=lambda i: len(sets[i])):
        members = np.fromiter((numbers[path] for path in sets[v]), dtype=np.intp, count=len(sets[v]))
        inside = top[members]
        children = np.unique(inside[inside >= 0])
        for child in children.tolist():
            if not sets[child] <= sets[v]:
                raise InputError(
                    f"covers: options for {_brief(sets[child])} and for {_brief(sets[v])} overlap without one "
                    "containing the other; give tied layers one common option"
                )
        if len(children):
            parent[children] = v
            height[v] = height[children].max() + 1
        splits[v] = bool(len(children)) and bool((inside >= 0).all())
        lowest[members[inside < 0]] = v
        top[members] = v
    return parent, splits, height, lowest


def _brief(paths: frozenset[str]) -> str:
    names = sorted(paths)
    return f"{{{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}}}"


def node_values(tree: Tree, weight: Floats) -> tuple[Floats, Floats, Floats]:
    """Least weight below each node: ``(best, own, split)``, each ``(nodes,)``; `split` is infinite where it cannot."""
    own = np.minimum.reduceat(weight[tree.order], tree.starts)
    best, split = own.copy(), np.zeros(len(tree))
    for level in tree.levels:
        split[level] = np.where(tree.splits[level], split[level], np.inf)
        best[level] = np.minimum(own[level], split[level])
        inner = level[tree.parent[level] >= 0]
        split += np.bincount(tree.parent[inner], weights=best[inner], minlength=len(tree))
    return best, own, split


def first_of_least(tree: Tree, weight: Floats, own: Floats) -> Integers:
    """``(nodes,)`` the preferred option among those of least weight `own` in each node."""
    first = np.where(weight[tree.order] == own[tree.node[tree.order]], np.arange(len(weight)), len(weight))
    return tree.order[np.minimum.reduceat(first, tree.starts)]


def best_splits(tree: Tree, weight: Floats) -> list[Integers]:
    """For every node that can be split, in ascending order, the choice of least `weight` in which it is split."""
    _, own, split = node_values(tree, weight)
    option = first_of_least(tree, weight, own)
    inside: list[list[int]] = [[] for _ in range(len(tree))]
    for v in np.concatenate(tree.levels).tolist():
        if tree.parent[v] >= 0:
            inside[int(tree.parent[v])] += [int(option[v])] if own[v] <= split[v] else inside[v]
    return [np.array(inside[v], dtype=np.intp) for v in np.flatnonzero(tree.splits).tolist()]


def select(tree: Tree, weight: Floats) -> tuple[float, Integers]:
    """The choice of least total `weight` ``(options,)`` that covers each layer once: ``(total, chosen options)``.

    Among options of equal weight the preferred one is taken, and one option before several. O(options).
    """
    best, own, split = node_values(tree, weight)
    active, taken = tree.parent < 0, np.zeros(len(tree), dtype=bool)
    for level in reversed(tree.levels):
        up = tree.parent[level]
        active[level] |= (up >= 0) & active[up] & ~taken[up]
        taken[level] = active[level] & (own[level] <= split[level])
    return float(best[tree.roots].sum()), np.sort(first_of_least(tree, weight, own)[taken])
