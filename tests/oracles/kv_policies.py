"""Slow and obvious: which tokens a cache keeps, with lists, and attention with explicit masks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["banded_mask", "heavy_hitter_logits", "kmeans_best", "kmeans_cost"]


def banded_mask(prompt: int, tokens: int, budget: int, sinks: int = 0) -> Tensor:
    """Bool ``(1, 1, tokens, tokens)``: the prompt sees itself; later tokens see sinks, the latest, and themselves."""
    mask = torch.zeros(tokens, tokens, dtype=torch.bool)
    for t in range(tokens):
        past = list(range(t))
        if t >= prompt and len(past) > budget:
            past = past[:sinks] + past[len(past) - (budget - sinks) :]
        for j in [*past, t]:
            mask[t, j] = True
    return mask[None, None]


@torch.no_grad()
def heavy_hitter_logits(model: Any, ids: Tensor, prompt: int, budget: int, recent: int) -> Tensor:
    """Logits of H2O ``(1, tokens, vocabulary)`` for a model of one layer, with a list of kept tokens for each head.

    Each step runs the whole text with the mask that the lists give, and reads the attention weights.
    """
    tokens, config = ids.shape[1], model.config
    heads, groups = config.num_attention_heads, config.num_attention_heads // config.num_key_value_heads
    kept: list[list[int]] = [[] for _ in range(config.num_key_value_heads)]
    score: list[dict[int, float]] = [{} for _ in kept]
    mask = torch.full((1, heads, tokens, tokens), torch.finfo(torch.float32).min)
    for t in range(tokens):
        for h in range(heads):
            visible = list(range(t + 1)) if t < prompt else [*kept[h // groups], t]
            mask[0, h, t] = torch.finfo(torch.float32).min
            mask[0, h, t, visible] = 0.0
        mask[:, :, t + 1 :, : t + 1] = 0.0  # rows to come: anything
        if t < prompt - 1:
            continue
        weights = model(input_ids=ids, attention_mask=mask, output_attentions=True).attentions[0][0]
        for g in range(len(kept)):
            kept[g] = list(range(prompt)) if t == prompt - 1 else [*kept[g], t]
            for query in range(prompt) if t == prompt - 1 else [t]:
                for h in range(g * groups, (g + 1) * groups):
                    for j in kept[g]:
                        if j <= query:
                            score[g][j] = score[g].get(j, 0.0) + float(weights[h, query, j])
            if len(kept[g]) > budget:
                late, early = kept[g][-recent:], kept[g][:-recent]
                best = sorted(early, key=lambda j: (-score[g][j], j))[: budget - recent]
                kept[g] = sorted([*best, *late])
    logits: Tensor = model(input_ids=ids, attention_mask=mask).logits
    return logits


def kmeans_cost(values: list[float], labels: list[int]) -> float:
    """Sum of squared distances to the means of the groups."""
    total = 0.0
    for label in set(labels):
        own = [v for v, mine in zip(values, labels, strict=True) if mine == label]
        mean = sum(own) / len(own)
        total += sum((v - mean) ** 2 for v in own)
    return total


def kmeans_best(values: list[float], groups: int) -> float:
    """Least cost over all places at which the sorted values can be cut."""
    import itertools

    ordered = sorted(values)
    best = float("inf")
    for cuts in itertools.combinations(range(1, len(ordered)), min(groups, len(set(values))) - 1):
        labels = [sum(i >= cut for cut in cuts) for i in range(len(ordered))]
        best = min(best, kmeans_cost(ordered, labels))
    return best
