"""SqueezeAttention (Wang et al., 2024): cache tokens by how much each layer's attention does."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from layerwright.allocate.kv_budgets import kmeans_1d, kv_budgets
from layerwright.core.calibration import evaluating
from layerwright.core.errors import BudgetError, InputError
from layerwright.core.layers import structure_copy
from layerwright.core.option import Scores
from layerwright.core.treatment import KVBudget
from layerwright.nn.kv import budget_cache_
from layerwright.recipes.deciders import Choice, Task
from layerwright.recipes.kv_rows import bounds_cache, context_length
from layerwright.score.attention_prompt import PromptSimilarity, attention_sites
from layerwright.score.base import Subject
from layerwright.score.blocks import attention_similarity

if TYPE_CHECKING:
    from layerwright.nn.kv.cache import BudgetedCache

__all__ = ["Squeezed", "decide_squeeze", "squeeze", "squeeze_generate"]

_KNOWN: Mapping[str, Any] = {
    "p": 0.35,
    "groups": 3,
    "policy": "streaming",
    "sinks": 4,
    "recent_fraction": 0.5,
    "positions": "absolute",
}


@dataclass(frozen=True)
class Squeezed:
    """A prompt whose cache was compressed.

    Attributes:
        cache: what is held; decode with it inside `layerwright.nn.kv.attention.budgeted_attention`.
        similarity: ``(layers,)`` of this prompt.
        budgets: tokens of each layer.
        logits: ``(batch, vocabulary)`` of the prompt's last token.
    """

    cache: BudgetedCache
    similarity: Tensor
    budgets: tuple[int, ...]
    logits: Tensor


@torch.no_grad()
def squeeze(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    mean_budget: int | None = None,
    fraction: float | None = None,
    p: float = 0.35,
    groups: int = 3,
    policy: str = "streaming",
    sinks: int = 4,
    recent_fraction: float = 0.5,
    positions: str = "absolute",
    row: int | None = None,
) -> Squeezed:
    """Read a prompt with a full cache, measure its similarity on the way, allocate tokens and compress the cache.

    Args:
        model: a decoder whose layers all attend to every token; left as it is.
        input_ids, attention_mask: ``(batch, tokens)``, padded on the left.
        mean_budget: tokens per layer on average; or
        fraction: of the prompt's tokens (0.2 in the paper).
        p, groups: see `layerwright.allocate.kv_budgets.kv_budgets`.
        policy, sinks, recent_fraction, positions: see `layerwright.nn.kv.cache.BudgetedCache`.
        row: the one row of the batch whose similarity counts; None for the mean.

    Raises:
        InputError: settings, a model with another kind of cache, or not exactly one of the two budgets.
    """
    from layerwright.nn.kv.attention import budgeted_attention
    from layerwright.nn.kv.cache import BudgetedCache

    length = int(input_ids.shape[1])
    if (mean_budget is None) == (fraction is None):
        raise InputError("mean_budget, fraction: give one of the two")
    if fraction is not None:
        if not 0 < fraction <= 1:
            raise InputError(f"fraction: got {fraction}, expected a share of the prompt above 0 and up to 1")
        mean_budget = max(sinks + 1, int(fraction * length))
    assert mean_budget is not None
    cache = BudgetedCache(model.config, None, policy, sinks, recent_fraction, positions)
    found = PromptSimilarity(model, attention_mask, row)
    with evaluating(model), budgeted_attention(model), found.watch():
        logits = model(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True
        ).logits[:, -1]
    similarity = found.values()
    budgets = kv_budgets(similarity.tolist(), mean_budget, p, groups, sinks + 1, length)
    cache.squeeze(budgets)
    return Squeezed(cache, similarity, budgets, logits)


def squeeze_generate(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    settings: Mapping[str, Any],
    **generation: Any,
) -> Tensor:
    """``model.generate`` after `squeeze` of all but the prompt's last token.

    Args:
        settings: of `squeeze`.
        generation: of ``generate``, such as ``max_new_tokens``.
    """
    from layerwright.nn.kv.attention import budgeted_attention

    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    done = squeeze(model, input_ids[:, :-1], mask[:, :-1], **settings)
    with budgeted_attention(model):
        found: Tensor = model.generate(input_ids, attention_mask=mask, past_key_values=done.cache, **generation)
    return found


def decide_squeeze(task: Task) -> Choice:
    """Tokens of every layer's cache from the similarity on the calibration prompts, at the mean that ``kv=`` allows.

    Settings (`Recipe.decider_settings`): `p` (0.35), or a list of which the one with the lowest calibration loss is taken;
    `groups` (3); `policy` (``streaming``), `sinks` (4), `recent_fraction`, `positions` of the budgets. The context is as long
    as a calibration sample. For budgets by prompt, see `squeeze`.

    Raises:
        BudgetError: no ``kv=`` limit, another limit beside it, or one below `sinks` + 1 tokens per layer.
        InputError: unknown settings, or a model or target that cannot have cache budgets.
    """
    settings = _settings(task.recipe.decider_settings)
    if not bounds_cache(task.budget) or len(task.budget.limits) > 1:
        raise BudgetError(f"budget: {task.recipe.name} holds kv= alone, such as kv=0.4x, got {task.budget}")
    if KVBudget.tag not in task.target.kinds:
        raise InputError(f"{task.target.name} cannot load cache budgets; {task.recipe.name} loads in layerwright only")
    length = context_length(task.bench.calibration)
    whole = task.profile.total.kv_bytes_per_token
    mean = min(math.floor(task.limits["kv_bytes_per_token"] / whole * length + 1e-9), length)
    if mean < settings["sinks"] + 1:
        least = (settings["sinks"] + 1) / length
        raise BudgetError(
            f"budget: {task.budget} is {mean} tokens of a context of {length}; the reachable minimum is "
            f"kv={math.ceil(1000 * least) / 1000:g}x ({settings['sinks'] + 1} tokens)"
        )
    data = task.bench.calibration.head(task.recipe.score_samples)
    names = tuple(name for stack in task.blocks if stack.role == "decoder" for name in stack.names)
    scores = attention_similarity(Subject(task.bench.model, data, blocks=names, progress=None))
    sites = {block: path for path, block in attention_sites(task.bench.model, list(names)).items()}
    similarity = [1 - scores.sensitivities[name] for name in names]
    shares = settings["p"] if isinstance(settings["p"], Sequence) else [settings["p"]]
    plans = {}
    for number, p in enumerate(shares):
        tokens = kv_budgets(similarity, mean, p, settings["groups"], settings["sinks"] + 1, length)
        plans[p] = {sites[name]: _budget(count, settings) for name, count in zip(names, tokens, strict=True)}
        if task.progress:
            task.progress("cache budgets", number + 1, len(shares))
    losses = {p: _loss(task, layers, data) for p, layers in plans.items()}
    base = data.mean_loss(task.bench.model)
    best = min(losses, key=losses.__getitem__)
    labels = kmeans_1d(similarity, settings["groups"])
    layers = {path: treatments for path, treatments in plans[best].items() if treatments[0].tokens < length}
    reasons = {
        sites[name]: f"similarity {value:.4f}, group {label + 1} of {max(labels) + 1}: "
        f"{plans[best][sites[name]][0].tokens} tokens against {mean} on average"
        for name, value, label in zip(names, similarity, labels, strict=True)
    }
    notes = (
        f"{labels.count(max(labels))} of {len(names)} layers, whose attention does least, keep {best:g} of {mean} tokens and "
        f"give the rest to the others; a context of {length} tokens"
    )
    extra = {"similarity": dict(zip(names, similarity, strict=True)), "p": best, "mean_tokens": mean, "context": length}
    return Choice(
        {path: tuple(treatments) for path, treatments in layers.items()},
        damage=losses[best] - base,
        reasons={path: why for path, why in reasons.items() if path in layers},
        notes=notes,
        scores={"similarity": _plain(scores)},
        extra=extra,
    )


def _budget(tokens: int, settings: Mapping[str, Any]) -> tuple[KVBudget]:
    rest = {key: settings[key] for key in ("policy", "sinks", "recent_fraction", "positions")}
    return (KVBudget(tokens, **rest),)


def _loss(task: Task, layers: Mapping[str, tuple[KVBudget]], data: Any) -> float:
    copy = structure_copy(task.bench.model)
    budget_cache_(copy, {path: own[0] for path, own in layers.items()})
    return float(data.mean_loss(copy))


def _plain(scores: Scores) -> Scores:
    return Scores(scores.scorer, sensitivities=scores.sensitivities, data=scores.data, meta={"loss_units": False})


def _settings(given: Mapping[str, Any]) -> dict[str, Any]:
    unknown = [key for key in given if key not in _KNOWN]
    if unknown:
        raise InputError(f"decider_settings: unknown {', '.join(unknown)}; known: {', '.join(_KNOWN)}")
    settings = {**_KNOWN, **given}
    KVBudget(max(settings["sinks"], 0) + 1, settings["policy"], settings["sinks"], settings["recent_fraction"])
    return settings
