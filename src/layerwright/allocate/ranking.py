"""Baselines that need no search: the same treatment everywhere, and the lowest-ranked blocks removed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from layerwright.allocate.problem import Problem, describe_amount, make_allocation, make_problem
from layerwright.allocate.tree import Integers, select
from layerwright.core.errors import BudgetError, InputError
from layerwright.core.option import Allocation, OptionTable, Scores
from layerwright.core.treatment import Treatments, describe

__all__ = ["keep_blocks", "one_shot", "uniform"]


def uniform(table: OptionTable, limits: Mapping[str, float], *, seed: int = 0) -> Allocation:
    """The least damaging treatment that holds the limits when every layer gets it: the baseline of all others.

    A layer that does not offer it (its inputs do not divide into the groups, say) is left alone; a treatment that
    cannot be given to such a layer and cannot be withheld from it is no candidate. No block is dropped.

    Args:
        table: the options.
        limits: resource to the highest total of the whole model.
        seed: not used; the result is the same for every seed.

    Raises:
        BudgetError: no treatment holds the limits; says what the smallest takes.
    """
    problem = make_problem(table, limits)
    candidates = [chosen for t in _treatments(table) if (chosen := _same(problem, t)) is not None]
    fitting = [chosen for chosen in candidates if problem.fits(chosen)]
    if not fitting:
        raise BudgetError(f"budget: no single treatment for all layers holds it: {_nearest(problem, candidates)}")
    best = min(fitting, key=lambda chosen: (problem.damage[chosen].sum(), problem.bytes[chosen].sum()))
    return make_allocation(problem, best, "uniform")


def _treatments(table: OptionTable) -> list[Treatments]:
    """Treatments of single layers, in order of first appearance; leaving everything alone among them."""
    found = dict.fromkeys(o.treatments for o in table.options if all(t.scope == "weight" for t in o.treatments))
    return list(dict.fromkeys([*found, ()]))


def _same(problem: Problem, treatments: Treatments) -> Integers | None:
    """The choice that gives `treatments` to as many layers as possible and leaves the others alone."""
    weight = np.array(
        [
            0.0 if o.treatments == treatments else float(len(o.covers)) if not o.treatments else np.inf
            for o in problem.options
        ]
    )
    value, chosen = select(problem.tree, weight)
    used = any(problem.options[i].treatments == treatments for i in chosen.tolist())
    return chosen if math.isfinite(value) and used else None


def _nearest(problem: Problem, candidates: Sequence[Integers]) -> str:
    if not candidates:
        return "none can be given to, or withheld from, every layer"
    parts = []
    for r, name in enumerate(problem.resources):
        least = min(candidates, key=lambda chosen: float(problem.cost[chosen, r].sum()))
        label = next((describe(problem.options[i].treatments) for i in least if problem.options[i].treatments), "kept")
        amount = problem.cost[least, r].sum() + problem.table.fixed.get(name)
        parts.append(f"the smallest, {label}, takes {describe_amount(problem.table, name, float(amount))}")
    return "; ".join(parts)


def one_shot(
    table: OptionTable,
    limits: Mapping[str, float],
    *,
    seed: int = 0,
    protect_first: int = 4,
    protect_last: int = 2,
) -> Allocation:
    """Remove the blocks whose removal damages least, one after the other, until the limits hold (Kim et al., 2024).

    Everything else keeps its least damaging option. Damages are those of one block removed alone, as measured.

    Args:
        table: the options, blocks in the model's order; a block can be removed where it has a `Drop` option.
        limits: resource to the highest total of the whole model.
        seed: not used; the result is the same for every seed.
        protect_first: blocks at the start that stay.
        protect_last: blocks at the end that stay.

    Raises:
        InputError: no block can be removed, or fewer are left than are protected.
        BudgetError: the limits do not hold with every unprotected block removed; says what that takes.
    """
    problem = make_problem(table, limits)
    drops = [i for i, o in enumerate(problem.options) if any(t.scope == "block" for t in o.treatments)]
    if not drops:
        raise InputError("one_shot: no option drops a block; score the blocks with a Drop treatment first")
    order = _removal_order([float(problem.damage[i]) for i in drops], protect_first, protect_last)
    # Kept out, a block's option weighs infinitely much; removed, less than everything else together.
    forced = -1.0 - 2.0 * float(np.abs(problem.damage).sum())
    weight, removed = problem.damage.copy(), set[str]()
    weight[drops] = np.inf
    value, chosen = select(problem.tree, weight)
    if not math.isfinite(value):
        raise InputError("one_shot: some layers have no option but a dropped block's; offer one that keeps them")
    for place in order:
        if problem.fits(chosen):
            break
        covers = problem.options[drops[place]].covers
        if removed.isdisjoint(covers):
            removed.update(covers)
            weight[drops[place]] = forced
            chosen = select(problem.tree, weight)[1]
    if not problem.fits(chosen):
        reached = [
            f"{name} {describe_amount(table, name, float(problem.cost[chosen, r].sum()) + table.fixed.get(name))}"
            for r, name in enumerate(problem.resources)
        ]
        raise BudgetError(
            f"budget: removing all {len(order)} unprotected blocks of {len(drops)} leaves {', '.join(reached)}; "
            "protect fewer blocks, raise the budget, or use another allocator"
        )
    return make_allocation(problem, chosen, "one_shot")


def keep_blocks(
    scores: Scores | Mapping[str, float] | Sequence[float],
    num_remove: int | None = None,
    ratio: float | None = None,
    *,
    protect_first: int = 4,
    protect_last: int = 2,
) -> list[int]:
    """Positions of the blocks that stay when those of the lowest scores are removed at once (Kim et al., 2024).

    Args:
        scores: damage of removing each block, in the model's order; of `Scores` its `sensitivities` are taken. An
            infinite score is never removed before a finite one. Of equal scores the earlier block goes first.
        num_remove: how many blocks are removed.
        ratio: share of all blocks that is removed, rounded down; give this or `num_remove`.
        protect_first: blocks at the start that stay.
        protect_last: blocks at the end that stay.

    Raises:
        InputError: no score or one that is not a number, both or none of `num_remove` and `ratio`, a ratio outside
            (0, 1) or below one block, as many blocks to remove as there are unprotected ones, or more.
    """
    if isinstance(scores, Scores):
        scores = scores.sensitivities
    values = [float(v) for v in (scores.values() if isinstance(scores, Mapping) else scores)]
    if (num_remove is None) == (ratio is None):
        raise InputError("num_remove: give either num_remove or ratio, not both and not none")
    order = _removal_order(values, protect_first, protect_last)
    if ratio is not None:
        if not 0 < ratio < 1:
            raise InputError(f"ratio: got {ratio}, expected a share between 0 and 1")
        num_remove = int(ratio * len(values) + 1e-9)
        if num_remove == 0:
            raise InputError(
                f"ratio: {ratio} of {len(values)} blocks is less than one; give at least {1 / len(values):.3g}"
            )
    assert num_remove is not None
    if not 0 <= num_remove < len(order):
        raise InputError(
            f"num_remove: got {num_remove} of {len(values)} blocks, expected 0 to {len(order) - 1} (the first "
            f"{protect_first} and the last {protect_last} are protected, and one unprotected block stays)"
        )
    removed = set(order[:num_remove])
    return [i for i in range(len(values)) if i not in removed]


def _removal_order(values: Sequence[float], protect_first: int, protect_last: int) -> list[int]:
    """Positions of the unprotected blocks, the lowest value first."""
    if protect_first < 0 or protect_last < 0:
        raise InputError(f"protect_first, protect_last: got {protect_first}, {protect_last}, expected 0 or more")
    bad = [i for i, value in enumerate(values) if math.isnan(value)]
    if bad or not values:
        raise InputError(
            f"scores: {f'block {bad[0]} is not a number' if bad else 'there are none'}; score the blocks again"
        )
    places = range(protect_first, len(values) - protect_last)
    if not places:
        raise InputError(
            f"protect_first, protect_last: {protect_first} and {protect_last} of {len(values)} blocks leave none to "
            "remove; protect fewer"
        )
    return sorted(places, key=lambda i: (values[i], i))
