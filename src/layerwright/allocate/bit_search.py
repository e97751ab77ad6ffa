"""Bits by a proxy's score: mutated vectors under a size limit, or the exact integer program."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from layerwright.allocate.exact import integer
from layerwright.allocate.problem import TOLERANCE, Problem, make_allocation, make_problem
from layerwright.allocate.program import any_choice
from layerwright.allocate.tree import Floats, Integers
from layerwright.core.errors import BudgetError, InputError
from layerwright.core.option import Allocation, OptionTable

__all__ = ["bit_search", "search_bits"]

ODDS: dict[int, tuple[float, ...]] = {3: (0.1, 0.3, 0.6), 5: (0.1, 0.1, 0.2, 0.2, 0.4)}
"""Probabilities of the choices of a mutated layer, cheapest first, as published; other numbers rise evenly."""

ROUND = 250
"""Vectors that are mutated and scored together."""

POOL = 16
"""Best vectors so far, from which the next ones are mutated."""


def bit_search(
    table: OptionTable,
    limits: Mapping[str, float],
    *,
    seed: int = 0,
    method: Literal["mutate", "milp"] = "mutate",
    samples: int = 5000,
    mutations: int = 3,
    odds: Sequence[float] | None = None,
) -> Allocation:
    """The choice of least summed damage among mutated ones (Dong et al., EMQ, 2023), or the least of all.

    Damages of a proxy add up, so ``milp`` is exact: the integer program. ``mutate`` looks at `samples` vectors; see
    `search_bits`. Both hold every limit.

    Args:
        table: options; ``mutate`` decides about layers only, and drops no block.
        limits: resource to the highest total of the whole model.
        seed: of the mutations.
        samples, mutations, odds: see `search_bits`.

    Raises:
        InputError: an unknown method, layers without options of their own, a setting out of its range.
        BudgetError: no choice holds the limits; says what can be reached.
    """
    if method == "milp":
        return replace(integer(table, limits, seed=seed), method="bit_search")
    if method != "mutate":
        raise InputError(f"method: got {method!r}, expected mutate or milp")
    problem = make_problem(table, limits)
    if (problem.tree.parent >= 0).any():
        # Options of a node with others below it are those of whole blocks.
        layers = ~np.isin(problem.tree.node, problem.tree.parent[problem.tree.parent >= 0])
        own = tuple(option for option, kept in zip(table.options, layers.tolist(), strict=True) if kept)
        if {path for option in own for path in option.covers} != set(table.layers):
            raise InputError("bit_search: layers without options of their own need another allocator, such as integer")
        problem = make_problem(replace(table, options=own), limits)
    ids, costs = _by_cost(problem)
    root = None
    if len(problem.resources) > 1:
        chosen = set(any_choice(problem).tolist())
        root = np.array([next(k for k, option in enumerate(row) if option in chosen) for row in ids.tolist()])

    def score(vectors: Integers) -> Floats:
        return -np.asarray(problem.damage[ids[np.arange(len(ids)), vectors]].sum(axis=1))

    found = search_bits(
        score,
        costs,
        problem.limits + problem.slack if problem.resources else 0.0,
        samples=samples,
        mutations=mutations,
        odds=odds,
        root=root,
        seed=seed,
    )
    return make_allocation(problem, ids[np.arange(len(ids)), found], "bit_search")


def _by_cost(problem: Problem) -> tuple[Integers, Floats]:
    """Options ``(layers, choices)`` of each layer, cheapest first, and their costs ``(layers, choices, resources)``; the
    last option stands for those that a layer lacks, at infinite cost.
    """
    own = [problem.tree.options_of(v) for v in range(len(problem.tree))]
    key = problem.cost[:, 0] if problem.resources else problem.bytes
    own = [options[np.lexsort((problem.bytes[options], key[options]))] for options in own]
    width = max(map(len, own))
    ids = np.array([[*options, *[options[-1]] * (width - len(options))] for options in own], dtype=np.intp)
    costs = problem.cost[ids] if problem.resources else problem.bytes[ids][..., None] * 0.0
    missing = np.arange(width) >= np.array([len(options) for options in own])[:, None]
    return ids, np.where(missing[..., None], np.inf, costs)


def search_bits(
    score: Callable[[Integers], Floats],
    costs: Any,
    limit: Any,
    *,
    samples: int = 5000,
    mutations: int = 3,
    odds: Sequence[float] | None = None,
    root: Integers | None = None,
    seed: int = 0,
) -> Integers:
    """The best-scored vector of choices ``(layers,)`` under a limit, among mutations of a root that holds it.

    A mutation draws 1 to `mutations` layers and gives each a new choice, the dearer the likelier; vectors over the limit
    are dropped. The best ones so far are mutated further. Cost: `samples` scores, 250 at a time.

    Args:
        score: ``score(vectors (n, layers)) -> (n,)``, higher is better; a choice is its number, 0 the cheapest.
        costs: ``(layers, choices)`` or ``(layers, choices, resources)``, rising along the choices; infinite where a
            layer has no such choice.
        limit: highest total, one number per resource.
        samples: vectors to look at.
        odds: probabilities of the choices, cheapest first; by default (.1, .3, .6) of three, (.1, .1, .2, .2, .4) of
            five, rising evenly otherwise.
        root: a first vector; by default the dearest uniform one that holds the limit.

    Raises:
        InputError: settings out of range, a score that is not a number.
        BudgetError: the cheapest vector is over the limit; says what it costs.
    """
    prices = np.asarray(costs, dtype=np.float64)
    prices = prices[..., None] if prices.ndim == 2 else prices
    bound = np.atleast_1d(np.asarray(limit, dtype=np.float64))
    layers, _, resources = prices.shape
    if samples < 1 or mutations < 1 or bound.shape != (resources,):
        raise InputError(
            f"search_bits: got samples={samples}, mutations={mutations}, {bound.size} limits for {resources} costs"
        )
    chances = _chances(np.asarray(np.isfinite(prices).all(axis=2)), odds)
    bound = bound + TOLERANCE * np.abs(bound)
    start = _uniform(prices, bound) if root is None else np.asarray(root, dtype=np.intp)
    random = np.random.default_rng(seed)
    everywhere = np.arange(layers)
    pool, values = start[None], np.asarray(score(start[None]), dtype=np.float64)
    for begin in range(0, samples, ROUND):
        count = min(ROUND, samples - begin)
        parents = pool[random.integers(len(pool), size=count)]
        # The layers of lowest random order are mutated, 1 to `mutations` of them.
        order = np.argsort(np.argsort(random.random((count, layers)), axis=1), axis=1)
        hit = order < random.integers(1, min(mutations, layers) + 1, size=(count, 1))
        drawn = (random.random((count, layers, 1)) > chances[:, :-1]).sum(axis=2)
        children = np.where(hit, drawn, parents)
        children = children[(prices[everywhere, children].sum(axis=1) <= bound).all(axis=1)]
        if not len(children):
            continue
        found = np.asarray(score(children), dtype=np.float64)
        if np.isnan(found).any():
            raise InputError("search_bits: the score of a vector is not a number")
        together, first = np.unique(np.concatenate([pool, children]), axis=0, return_index=True)
        kept = np.concatenate([values, found])[first]
        best = np.argsort(-kept, kind="stable")[:POOL]
        pool, values = together[best], kept[best]
    return np.asarray(pool[int(np.argmax(values))])


def _chances(there: np.ndarray[Any, np.dtype[np.bool_]], odds: Sequence[float] | None) -> Floats:
    """``(layers, choices)`` cumulative probabilities of the choices that each layer has."""
    layers, choices = there.shape
    if odds is not None and (len(odds) != choices or min(odds) < 0 or sum(odds) <= 0):
        raise InputError(f"odds: got {list(odds)}, expected {choices} probabilities, cheapest choice first")
    rows = []
    for count in there.sum(axis=1).tolist():
        own = np.array(odds[:count] if odds is not None else ODDS.get(count, range(1, count + 1)), dtype=np.float64)
        own = own if own.sum() > 0 else np.ones(count)
        rows.append(np.concatenate([np.cumsum(own / own.sum())[:-1], np.ones(choices - count + 1)]))
    return np.array(rows).reshape(layers, choices)


def _uniform(prices: Floats, bound: Floats) -> Integers:
    """The dearest vector of one choice for all layers (each layer's dearest where it has fewer) under the bound."""
    last = np.isfinite(prices).all(axis=2).sum(axis=1) - 1
    everywhere = np.arange(len(prices))
    for choice in range(prices.shape[1] - 1, -1, -1):
        vector = np.minimum(choice, last)
        if (prices[everywhere, vector].sum(axis=0) <= bound).all():
            return np.asarray(vector)
    least = prices[:, 0].sum(axis=0)
    raise BudgetError(
        f"budget: the limit {bound.tolist()} is below what can be reached: the cheapest vector costs {least.tolist()}; "
        "raise the budget or offer cheaper choices"
    )
