"""Layers grouped by how their damage falls with the treatment; one decision per group."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from layerwright.allocate.problem import Problem, make_allocation, make_problem
from layerwright.allocate.program import solve_program
from layerwright.allocate.tree import Floats, Integers
from layerwright.core.errors import BudgetError, InputError
from layerwright.core.option import Allocation, OptionTable
from layerwright.core.treatment import Treatments

__all__ = ["cluster_layers", "clusters"]


def clusters(
    table: OptionTable,
    limits: Mapping[str, float],
    *,
    seed: int = 0,
    count: int = 8,
    method: Literal["hierarchical", "kmeans"] = "hierarchical",
) -> Allocation:
    """Layers with similar damage curves share one treatment; the best sharing is found by an integer program.

    Blocks are dropped one by one: a dropped block's layers leave their clusters.

    Args:
        table: the options.
        limits: resource to the highest total of the whole model.
        seed: for `kmeans`.
        count: how many clusters, at least one for every set of treatments on offer.
        method: `hierarchical` (Ward's linkage, the same for every seed) or `kmeans`.

    Raises:
        InputError: `count` below 1, or an unknown `method`.
        BudgetError: the limits cannot be held with one treatment per cluster.
    """
    problem = make_problem(table, limits)
    cluster, treatment = cluster_layers(problem, count, method, seed)
    solution = solve_program(
        problem, problem.damage, np.ones(len(table), dtype=bool), links=_links(problem, cluster, treatment)
    )
    if solution.chosen is None:
        raise BudgetError(
            f"budget: no choice of one treatment for each of {int(cluster.max()) + 1} clusters holds it; take more "
            "clusters or another allocator"
        )
    return make_allocation(problem, solution.chosen, "clusters")


def cluster_layers(problem: Problem, count: int, method: str, seed: int) -> tuple[Integers, Integers]:
    """Cluster of each node ``(nodes,)`` and number of each option's treatments ``(options,)``; -1 for a block's.

    Nodes that offer the same treatments are compared by the logarithm of their damages.
    """
    if count < 1 or method not in ("hierarchical", "kmeans"):
        raise InputError(f"clusters: got count={count}, method={method!r}; expected 1 or more, hierarchical or kmeans")
    numbers: dict[Treatments, int] = {}
    treatment = np.full(len(problem.options), -1, dtype=np.intp)
    for i, option in enumerate(problem.options):
        if all(t.scope == "weight" for t in option.treatments):
            treatment[i] = numbers.setdefault(option.treatments, len(numbers))
    families: dict[tuple[int, ...], list[int]] = {}
    for v in range(len(problem.tree)):
        offered = treatment[problem.tree.options_of(v)]
        if (offered >= 0).any():
            families.setdefault(tuple(sorted(set(offered[offered >= 0].tolist()))), []).append(v)
    nodes = sum(map(len, families.values()))
    cluster = np.full(len(problem.tree), -1, dtype=np.intp)
    for offered_set, members in families.items():
        share = max(1, round(count * len(members) / nodes))
        curves = _curves(problem, members, offered_set, treatment)
        cluster[members] = cluster.max(initial=-1) + 1 + _partition(curves, share, method, seed)
    return cluster, treatment


def _curves(problem: Problem, nodes: list[int], offered: tuple[int, ...], treatment: Integers) -> Floats:
    """``(nodes, treatments)`` logarithms of the damages."""
    damages = np.full((len(nodes), len(offered)), np.inf)
    column = {t: k for k, t in enumerate(offered)}
    for row, v in enumerate(nodes):
        for i in problem.tree.options_of(v).tolist():
            if treatment[i] >= 0:
                k = column[int(treatment[i])]
                damages[row, k] = min(damages[row, k], problem.damage[i])
    positive = damages[damages > 0]
    floor = float(positive.min()) * 0.1 if positive.size else 1.0
    curves: Floats = np.log10(np.maximum(damages, floor))
    return curves


def _partition(curves: Floats, count: int, method: str, seed: int) -> Integers:
    """Cluster numbers 0, 1, ... of the rows of `curves`."""
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.cluster.vq import kmeans2

    distinct = len(np.unique(curves, axis=0))
    if min(count, distinct) == 1:
        return np.zeros(len(curves), dtype=np.intp)
    if method == "hierarchical":
        labels = fcluster(linkage(curves, method="ward"), min(count, distinct), criterion="maxclust")
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an empty cluster only means fewer clusters
            _, labels = kmeans2(curves, min(count, distinct), minit="++", seed=np.random.default_rng(seed))
    return np.asarray(np.unique(labels, return_inverse=True)[1], dtype=np.intp)


def _links(problem: Problem, cluster: Integers, treatment: Integers) -> tuple[int, Any, tuple[Floats, Floats]]:
    """One variable per cluster and treatment; an option needs its cluster's, and a cluster has one."""
    from scipy.sparse import coo_array

    shared = np.flatnonzero((treatment >= 0) & (cluster[problem.tree.node] >= 0))
    key = np.column_stack([cluster[problem.tree.node[shared]], treatment[shared]])
    pairs, which = np.unique(key, axis=0, return_inverse=True)
    options, links, extra = len(treatment), len(shared), len(pairs)
    count = int(cluster.max()) + 1
    rows = np.concatenate([np.arange(links), np.arange(links), links + pairs[:, 0]])
    columns = np.concatenate([shared, options + which.ravel(), options + np.arange(extra)])
    values = np.concatenate([np.ones(links), -np.ones(links), np.ones(extra)])
    # At a root an option is taken exactly when its cluster takes its treatment; under a block it may be dropped.
    free = problem.tree.parent[problem.tree.node[shared]] >= 0
    lower = np.concatenate([np.where(free, -math.inf, 0.0), np.ones(count)])
    upper = np.concatenate([np.zeros(links), np.ones(count)])
    return extra, coo_array((values, (rows, columns)), shape=(links + count, options + extra)).tocsr(), (lower, upper)
