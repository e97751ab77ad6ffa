"""Deciders that remove whole blocks: one after the other with new scores each time, or by a fixed pattern."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, NoReturn

from layerwright.allocate.interleaved import interleaved_keep
from layerwright.core.cost import Cost, total
from layerwright.core.errors import BudgetError, InputError
from layerwright.core.skip import skip_blocks
from layerwright.core.treatment import Drop
from layerwright.recipes.deciders import Choice, Task
from layerwright.recipes.removable import removable
from layerwright.score.base import SCORERS, Subject

__all__ = ["decide_interleaved", "decide_iteratively"]


def decide_iteratively(task: Task) -> Choice:
    """Remove the block that a scorer ranks lowest, score the rest again, until the budget holds (Kim et al., 2024).

    Settings (`Recipe.decider_settings`): `scorer` (``block_perplexity``) and `scorer_settings`; `protect_first` and
    `protect_last`, blocks of each stack that stay, as counts or shares of its depth (0). Time: one pass of the scorer
    for each removed block.

    Raises:
        InputError: the model has no block that can be removed, or a setting is unknown.
        BudgetError: the budget is below what removing all of them leaves.
    """
    settings = _settings(
        task, {"scorer": "block_perplexity", "scorer_settings": {}, "protect_first": 0, "protect_last": 0}
    )
    scorer = SCORERS.get(settings["scorer"])
    free = _free(task, settings["protect_first"], settings["protect_last"])
    removed: dict[str, float] = {}
    while not _holds(task, removed):
        left = [name for name in free if name not in removed and _stays(task, {*removed, name})]
        if not left:
            _refuse(task, removed, f"removing all {len(removed)} blocks that may go")
        with skip_blocks(task.bench.model, list(removed)):
            subject = Subject(task.bench.model, task.bench.calibration, blocks=left, seed=task.seed)
            scores = scorer(subject, **settings["scorer_settings"]).sensitivities
        lowest = min(left, key=lambda name: (scores[name], left.index(name)))
        if not math.isfinite(scores[lowest]):
            _refuse(task, removed, "every block that is left counts as indispensable; removing those before")
        removed[lowest] = scores[lowest]
        if task.progress:
            task.progress(f"removing {lowest}", len(removed), len(free))
    reasons = {
        name: f"removed as number {number + 1}: {settings['scorer']} {score:.4g}, the lowest of those left"
        for number, (name, score) in enumerate(removed.items())
    }
    notes = f"removed one after the other by {settings['scorer']}, scored again each time"
    return Choice(dict.fromkeys(removed, (Drop(),)), reasons=reasons, notes=notes)


def decide_interleaved(task: Task) -> Choice:
    """Keep both ends of every stack and every second block between them (Zhu et al., 2023, arXiv 2305.08285).

    Settings: `keep_first` (3), `keep_last` (1), `stride` (2). The pattern is fixed: a budget is only held against it.

    Raises:
        BudgetError: the pattern takes more than the budget; says what it takes.
        InputError: a block of the pattern cannot be removed, or a setting is unknown.
    """
    settings = _settings(task, {"keep_first": 3, "keep_last": 1, "stride": 2})
    removed: list[str] = []
    for stack in task.blocks:
        kept = interleaved_keep(len(stack), settings["keep_first"], settings["keep_last"], settings["stride"])
        removed += [name for index, name in enumerate(stack.names) if index not in kept]
    fixed = set(removed).difference(removable(task.bench.model, task.blocks))
    if fixed:
        raise InputError(f"{min(fixed)} cannot be removed, which the pattern asks for; raise keep_first")
    if not removed:
        raise InputError("no stack is deep enough for the pattern; lower keep_first, or use another recipe")
    if not _holds(task, removed):
        _refuse(task, removed, f"the pattern, {len(removed)} blocks removed,")
    notes = (
        f"the first {settings['keep_first']}, the last {settings['keep_last']} and every {settings['stride']}nd stay"
    )
    return Choice(dict.fromkeys(removed, (Drop(),)), notes=notes)


def _settings(task: Task, defaults: Mapping[str, Any]) -> dict[str, Any]:
    given = dict(task.recipe.decider_settings)
    odd = sorted(given.keys() - defaults.keys())
    if odd:
        raise InputError(f"decider_settings: unknown {odd[0]!r}, expected some of {', '.join(defaults)}")
    return {**defaults, **given}


def _free(task: Task, first: float, last: float) -> list[str]:
    """Blocks that may go: those that can, without the protected ends of their stacks."""
    can = set(removable(task.bench.model, task.blocks))
    found: list[str] = []
    for stack in task.blocks:
        ends = [math.ceil(n * len(stack) - 1e-9) if 0 < n < 1 else int(n) for n in (first, last)]
        found += [name for name in stack.names[ends[0] : len(stack) - ends[1]] if name in can]
    if not found:
        raise InputError(f"recipe {task.recipe.name} removes blocks, and none of this model's can go")
    return found


def _stays(task: Task, removed: Collection[str]) -> bool:
    """Whether every stack keeps a block."""
    return all(any(name not in removed for name in stack.names) for stack in task.blocks)


def _cost(task: Task, removed: Collection[str]) -> Cost:
    return task.profile.total - total(task.profile[name].cost for name in removed)


def _holds(task: Task, removed: Collection[str]) -> bool:
    cost = _cost(task, removed)
    return all(cost.get(name) <= bound * (1 + 1e-9) for name, bound in task.limits.items())


def _refuse(task: Task, removed: Collection[str], what: str) -> NoReturn:
    cost = _cost(task, removed)
    parts = [
        f"{name.replace('_', ' ')} {cost.get(name) / max(task.profile.total.get(name), 1e-30):.3f}x"
        for name, bound in task.limits.items()
        if cost.get(name) > bound * (1 + 1e-9)
    ]
    raise BudgetError(
        f"budget: {task.budget} cannot be reached with recipe {task.recipe.name}: {what} leaves {', '.join(parts)}"
    )
