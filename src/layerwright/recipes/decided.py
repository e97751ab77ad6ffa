"""From a decider's choice, or a rule for attention modules, to rows of the option table."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from layerwright.core.budget import Budget
from layerwright.core.cost import Cost, total
from layerwright.core.errors import BudgetError, InputError
from layerwright.core.layer import LayerRef
from layerwright.core.option import Allocation, Option, OptionTable
from layerwright.core.storage import activation_bytes
from layerwright.core.treatment import Treatments
from layerwright.recipes.deciders import DECIDERS, Choice, Task
from layerwright.recipes.kv_rows import with_saved_cache
from layerwright.recipes.table import MsOf, planned_in, treated_cost
from layerwright.treat.activations import norm_channels

__all__ = ["decided_table", "range_bytes", "run_decider", "with_attention"]


def run_decider(task: Task, ms: MsOf | None = None) -> tuple[OptionTable, Allocation, Choice]:
    """Ask the recipe's decider, and write its choice down as a table of what was taken and what was there.

    Raises:
        BudgetError: the choice does not keep to the budget.
    """
    choice = DECIDERS.get(task.recipe.decider)(task)
    table, allocation = decided_table(task, choice, ms)
    for limit in task.budget:
        bound, used = task.limits[limit.resource], allocation.cost.get(limit.resource)
        if limit.name == "bits" and "nominal_bits" in choice.extra:
            # Some methods count the widths alone: their scales and zero points come on top, and are reported.
            bound, used = limit.value, float(choice.extra["nominal_bits"])
        if limit.resource != "ms" and used > bound * (1 + 1e-9) + 0.5:
            raise BudgetError(
                f"budget: {limit} cannot be reached with recipe {task.recipe.name}: its choice takes {used:,.0f}"
                f" {limit.resource.replace('_', ' ')}, the limit is {bound:,.0f}"
            )
    return table, allocation, choice


def decided_table(task: Task, choice: Choice, ms: MsOf | None = None) -> tuple[OptionTable, Allocation]:
    """The choice as options and their sum; layers of `task.refs` that it does not name are kept."""
    refs = {ref.path: ref for ref in task.refs}
    before = {path: task.profile[path].cost for path in refs}
    stacks = {name for stack in task.blocks for name in stack.names}
    kept = [Option(path, (), before[path], 0.0) for path in refs]
    chosen: dict[str, Option] = {option.layer: option for option in kept}
    rows = list(kept)
    for path, treatments in choice.layers.items():
        if not treatments:
            continue
        if path in refs:
            cost = treated_cost(refs[path], before[path], treatments, task.element_bytes, ms)
            option = Option(path, treatments, cost, 0.0)
        elif path in stacks and any(t.scope == "block" for t in treatments):
            inside = tuple(planned_in(path, task.refs))
            rest = total(before[p] for p in inside) - task.profile[path].cost
            option = Option(path, treatments, rest, 0.0, inside)
            for inner in inside:
                chosen.pop(inner, None)
        else:
            channels = norm_channels(task.bench.model.get_submodule(path))
            option = _range_option(path, treatments, channels or 1)
            option = with_saved_cache(option, task.profile, task.bench.calibration)
        rows.append(option)
        chosen[path] = option
    fixed = task.profile.total - total(before.values())
    table = OptionTable(tuple(rows), fixed, task.profile.total, task.profile.loss)
    cost = fixed + total(option.cost for option in chosen.values())
    reasons = {path: why for path, why in choice.reasons.items() if path in choice.layers}
    damage = choice.damage
    return table, Allocation(tuple(chosen.values()), cost, damage, reasons, task.recipe.decider)


def with_attention(allocation: Allocation, refs: Sequence[LayerRef], treatments: Treatments) -> Allocation:
    """`allocation` with `treatments` for every attention module of the model."""
    if not treatments:
        return allocation
    modules = [ref.path for ref in refs if ref.kind == "attention"]
    if not modules:
        raise InputError("the recipe rounds the products of attention, and this model has no attention modules")
    extra = [_range_option(path, treatments) for path in modules]
    cost = allocation.cost + total(option.cost for option in extra)
    return dataclasses.replace(allocation, chosen=(*allocation.chosen, *extra), cost=cost)


def range_bytes(
    budget: Budget, candidates: Mapping[str, Sequence[Treatments]], refs: Sequence[LayerRef], attention: Treatments
) -> tuple[float, float]:
    """``(more for a bits= budget, of attention modules)`` bytes of the ranges that rounded activations need.

    A budget in bits is about weights, so that ranges come on top of it.
    """
    shapes = {ref.path: ref.shape for ref in refs}
    layers = sum(
        max((activation_bytes(t, shapes[path][1]) for t in options), default=0) for path, options in candidates.items()
    )
    modules = activation_bytes(attention) * sum(ref.kind == "attention" for ref in refs)
    in_bits = any(limit.name == "bits" for limit in budget)
    return (float(layers + modules) if in_bits else 0.0), float(modules)


def _range_option(path: str, treatments: Treatments, channels: int = 1) -> Option:
    """An attention module, or a norm whose input of `channels` is rounded: bytes of its ranges alone."""
    return Option(path, treatments, Cost(bytes=float(activation_bytes(treatments, channels))), 0.0)
