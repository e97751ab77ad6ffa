"""Options that limit the tokens of a key-value cache: rows for attention modules beside those for weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from torch import nn

from layerwright.core.budget import Budget
from layerwright.core.calibration import Calibration
from layerwright.core.cost import Cost
from layerwright.core.errors import InputError
from layerwright.core.layers import structure_copy
from layerwright.core.option import Option, OptionTable, Scores
from layerwright.core.profile import Profile
from layerwright.core.target import Target
from layerwright.core.treatment import KVBudget, Treatments
from layerwright.nn.kv import budget_cache_

if TYPE_CHECKING:
    from layerwright.recipes.bench import Bench

__all__ = [
    "bounds_cache",
    "budget_of",
    "cache_option",
    "context_length",
    "free_rows",
    "measured_rows",
    "uniform_budgets",
    "with_rows",
    "with_saved_cache",
]

POLICY: Literal["window", "streaming", "h2o"] = "streaming"
"""Policy of the offered budgets: its first tokens cost next to nothing and most language models lean on them."""
SINKS = 4


def bounds_cache(limits: Budget) -> bool:
    """Whether the budget limits the cache."""
    return any(limit.resource == "kv_bytes_per_token" for limit in limits)


def budget_of(treatments: Treatments) -> KVBudget | None:
    """The cache budget among `treatments`."""
    return next((t for t in treatments if isinstance(t, KVBudget)), None)


def context_length(data: Calibration) -> int:
    """Tokens in a sample of `data`: the context over which cache bytes are averaged.

    Raises:
        InputError: its batches hold no tokens.
    """
    batch = next(iter(data))
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if ids is None:
        raise InputError(f"{data.name}: cache budgets need text, batches with input_ids")
    return int(ids.shape[1])


def cache_option(path: str, budget: KVBudget, kv_bytes: float, length: int, damage: float = 0.0) -> Option:
    """The row of an attention module whose cache takes `kv_bytes` per token: what it saves, as a negative cost.

    Over a context of `length` tokens a cache of fewer takes ``tokens / length`` of its bytes.
    """
    saved = kv_bytes * (min(budget.tokens, length) / length - 1)
    return Option(path, (budget,), Cost(kv_bytes_per_token=saved), damage)


def with_saved_cache(option: Option, profile: Profile, data: Calibration) -> Option:
    """The row of an attention module with the cache that its budget saves, if it has one."""
    budget = budget_of(option.treatments)
    if budget is None:
        return option
    kv_bytes = profile[option.layer].cost.kv_bytes_per_token
    saved = cache_option(option.layer, budget, kv_bytes, context_length(data)).cost
    return dataclasses.replace(option, cost=option.cost + saved)


def free_rows(
    model: nn.Module, data: Calibration, profile: Profile, limits: Budget, goal: Target, shares: Sequence[float]
) -> tuple[Option, ...]:
    """A row for keeping each attention module's cache and one for each of `shares` of the context, with damages of zero.

    None where there are no shares, the budget does not limit the cache, the target cannot load budgets, or the model cannot have them.
    """
    if not shares or not bounds_cache(limits) or KVBudget.tag not in goal.kinds:
        return ()
    from layerwright.nn.kv.attention import cache_owners
    from layerwright.nn.kv.cache import plain_layers

    try:
        owners, length = cache_owners(model), context_length(data)
        plain_layers(model.config)
    except (InputError, AttributeError):
        return ()
    rows = []
    for path in owners:
        kv_bytes = profile[path].cost.kv_bytes_per_token
        rows.append(Option(path, (), Cost(), 0.0))
        counts = {max(SINKS + 1, round(share * length)) for share in shares}
        rows += [
            cache_option(path, KVBudget(tokens, POLICY, SINKS), kv_bytes, length)
            for tokens in sorted(counts)
            if tokens < length
        ]
    return tuple(rows)


def measured_rows(bench: Bench, rows: Sequence[Option], samples: int) -> tuple[tuple[Option, ...], Scores]:
    """`rows` with damages: the loss with that one layer's cache limited, minus the loss with all of it.

    Losses are those of texts decoded from their first token, see `layerwright.nn.kv.CacheBudget`. Cost: one forward of
    `samples` samples per row.
    """
    data = bench.calibration.head(samples)
    base = data.mean_loss(bench.model)
    found: dict[tuple[str, Treatments], float] = {}
    for option in rows:
        budget = budget_of(option.treatments)
        if budget is not None:
            copy = structure_copy(bench.model)
            budget_cache_(copy, {option.layer: budget})
            found[(option.layer, option.treatments)] = data.mean_loss(copy) - base
    scores = Scores("cache_budget", found, data=data.fingerprint(), base_loss=base)
    measured = tuple(dataclasses.replace(o, damage=found.get((o.layer, o.treatments), 0.0)) for o in rows)
    return measured, scores


def with_rows(table: OptionTable, rows: Sequence[Option]) -> OptionTable:
    """`table` with `rows`; a dropped block takes its attention's cache with it."""
    paths = list(dict.fromkeys(row.layer for row in rows))
    options = []
    for option in table.options:
        inside: tuple[str, ...] = ()
        if any(t.scope == "block" for t in option.treatments):
            inside = tuple(path for path in paths if path.startswith(option.layer + "."))
        options.append(dataclasses.replace(option, covers=(*option.covers, *inside)) if inside else option)
    return dataclasses.replace(table, options=(*options, *rows))


def uniform_budgets(
    layers: Mapping[str, Treatments], profile: Profile, limits: Mapping[str, float], data: Calibration
) -> tuple[dict[str, Treatments], str]:
    """The uniform baseline of a plan with cache budgets: as many tokens in every layer as the limit allows, and words.

    Empty for a plan without.
    """
    budgets = {path: budget for path, own in layers.items() if (budget := budget_of(own)) is not None}
    total = profile.total.kv_bytes_per_token
    if not budgets or not total:
        return {}, ""
    first, length = next(iter(budgets.values())), context_length(data)
    bound = min(limits.get("kv_bytes_per_token", total), total)
    tokens = max(first.sinks + 1, math.floor(bound / total * length + 1e-9))
    uniform = dataclasses.replace(first, tokens=tokens)
    paths = [row.ref.path for row in profile if row.ref.kind == "attention" and row.cost.kv_bytes_per_token]
    return dict.fromkeys(paths, (uniform,)), f"{tokens} cache tokens in every layer ({first.policy})"
