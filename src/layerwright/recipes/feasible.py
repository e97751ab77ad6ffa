"""Whether a budget can be met at all, from costs alone: asked before anything is scored, and before weights are loaded."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial

from layerwright.allocate import ALLOCATORS, filter_target, merge_ties, minimum
from layerwright.allocate.problem import describe_amount, make_problem
from layerwright.allocate.program import any_choice
from layerwright.core.blocks import Blocks
from layerwright.core.budget import Budget, Limit
from layerwright.core.errors import BudgetError, InputError
from layerwright.core.layer import LayerRef
from layerwright.core.option import Option, OptionTable, Scores
from layerwright.core.profile import Profile
from layerwright.core.recipe import Recipe
from layerwright.core.target import Target
from layerwright.core.treatment import Treatments
from layerwright.recipes.kv_rows import with_rows
from layerwright.recipes.removable import COUNTS_PLACES, leave_one
from layerwright.recipes.table import MsOf, fused_groups, limits_of, option_table, uniform_bytes
from layerwright.treat.narrow import FeedForward

__all__ = ["STATIC", "refuse_unreachable", "static_part"]

STATIC = ("bytes", "params", "kv_bytes_per_token")
"""Resources that follow from the shapes; FLOPs and milliseconds need a forward."""

_RIGID = ("one_shot", "uniform")
"""Allocators that offer fewer choices than the table holds, and decide which ones by cost."""


def static_part(limits: Budget) -> Budget:
    """The limits on resources that follow from the shapes alone."""
    return Budget(tuple(limit for limit in limits if limit.resource in STATIC))


def refuse_unreachable(
    limits: Budget,
    profile: Profile,
    refs: Sequence[LayerRef],
    candidates: Mapping[str, Sequence[Treatments]],
    chosen: Recipe,
    goal: Target,
    *,
    element_bytes: int,
    blocks: Sequence[Blocks] = (),
    ms: MsOf | None = None,
    settings: Mapping[str, int] | None = None,
    parts: Mapping[str, FeedForward] | None = None,
    cache: Sequence[Option] = (),
    free: Collection[str] | None = None,
) -> None:
    """Refuse a budget that no choice among the recipe's treatments meets, whatever the scores will be.

    The table of `layerwright.recipes.table.option_table` is built with damages of zero. Each limit is held against
    the smallest total of its resource, several limits against each other, and for an allocator that offers fewer
    choices than the table, its own.

    Args:
        limits: the budget.
        profile: costs of every layer and block; FLOPs and times where they are limited.
        refs: the layers that are planned.
        candidates: treatments by layer.
        chosen, goal: what is offered, and what must load the result.
        element_bytes: of one untreated weight.
        blocks: the stacks whose blocks may go, if the recipe drops blocks.
        ms: time after treatment, as the table will be given it.
        settings: of the allocator.
        parts: feed-forward parts that may be made narrower.
        free: the blocks that may go; None means all.
        cache: rows that limit caches (`layerwright.recipes.kv_rows`).

    Raises:
        BudgetError: a limit that cannot be met; names the reachable minimum in the limit's own unit.
        InputError: a relative limit on a resource of which the model has none, or a recipe that only drops blocks for
            a model without.
    """
    if chosen.drop_blocks and not blocks and not any(candidates.values()):
        raise InputError(f"recipe {chosen.name} drops blocks, and the model has no repeated blocks")
    if not limits.limits or not (any(candidates.values()) or chosen.drop_blocks):
        return
    table = _table(profile, refs, candidates, chosen, goal, element_bytes, blocks, ms, parts, cache, free)
    bounds = limits_of(limits, table, refs, chosen.group_size, element_bytes)
    for limit in limits:
        least = minimum(table, limit.resource)
        if least > bounds[limit.resource] * (1 + 1e-9):
            reach = _in_unit(limit, least, table, refs, chosen.group_size, element_bytes)
            raise BudgetError(
                f"budget: {limit} cannot be reached with recipe {chosen.name}; the reachable minimum is {reach}"
            )
    if chosen.allocator in _RIGID:
        partial(ALLOCATORS.get(chosen.allocator), limits=bounds, **dict(settings or {}))(table)
    elif len(bounds) > 1:
        any_choice(make_problem(table, bounds))


def _table(
    profile: Profile,
    refs: Sequence[LayerRef],
    candidates: Mapping[str, Sequence[Treatments]],
    chosen: Recipe,
    goal: Target,
    element_bytes: int,
    blocks: Sequence[Blocks],
    ms: MsOf | None,
    parts: Mapping[str, FeedForward] | None,
    cache: Sequence[Option],
    may_go: Collection[str] | None,
) -> OptionTable:
    free = Scores("none", {(path, t): 0.0 for path, options in candidates.items() for t in options})
    dropping = chosen.drop_blocks and bool(blocks)
    names = [name for stack in blocks for name in stack.names if may_go is None or name in may_go]
    # One block of a stack stays, whichever hurts most; here the cheapest one, so that no budget is refused that can be met.
    drops = Scores("none", sensitivities={name: -profile[name].cost.bytes for name in names})
    if chosen.allocator not in COUNTS_PLACES:
        drops = leave_one(drops, blocks)
    drops = replace(drops, sensitivities=dict.fromkeys(drops.sensitivities, 0.0))
    table = option_table(
        profile,
        refs,
        candidates,
        free,
        element_bytes=element_bytes,
        blocks=blocks,
        drop_scores=drops if dropping else None,
        ms=ms,
        parts=parts,
    )
    groups = fused_groups(refs, goal)
    return filter_target(with_rows(merge_ties(table, groups) if groups else table, cache), goal)


def _in_unit(
    limit: Limit, least: float, table: OptionTable, refs: Sequence[LayerRef], group_size: int, element_bytes: int
) -> str:
    """The amount `least` as the limit would say it, rounded up so that the number itself can be reached."""
    if limit.name == "bits":
        numel = sum(ref.numel for ref in refs)
        scales = uniform_bytes(refs, 2, group_size, element_bytes) - numel / 4
        untouched = table.original.bytes - numel * element_bytes
        bits = (least - untouched - scales) * 8 / numel
        if bits >= 1:
            return f"bits={_up(bits, 2)}"
        return describe_amount(table, limit.resource, least)
    if limit.unit == "relative":
        amount = describe_amount(table, limit.resource, least).partition(" (")[0]
        if limit.resource == "bytes":
            amount = f"{least / 1e6:.2f} MB"
        return f"{limit.name}={_up(least / table.original.get(limit.resource), 3)}x ({amount})"
    return describe_amount(table, limit.resource, least)


def _up(number: float, digits: int) -> str:
    scale = 10**digits
    return f"{math.ceil(number * scale - 1e-6) / scale:.{digits}f}"
