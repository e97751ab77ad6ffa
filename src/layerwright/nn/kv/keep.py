"""Which tokens a key-value cache keeps: indices from what is known of each slot, no loops."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["POLICIES", "choose_kept", "heavy_hitter_mask", "past_mask", "recent_tokens"]

POLICIES = ("window", "streaming", "h2o")
"""Sliding window; StreamingLLM (Xiao et al., 2023, arXiv 2309.17453); H2O (Zhang et al., 2023, arXiv 2306.14048)."""


def recent_tokens(budget: int, recent_fraction: float) -> int:
    """How many of `budget` tokens H2O gives to the latest ones, at least one; the others are heavy hitters."""
    return max(1, budget - int(budget * (1 - recent_fraction)))


def choose_kept(
    real: Tensor, budget: int, policy: str, *, sinks: int = 4, recent: int = 0, scores: Tensor | None = None
) -> Tensor:
    """Indices ``(batch, heads, min(budget, slots))`` of the slots that stay, in their order.

    Args:
        real: ``(batch, heads, slots)``, False for padding, which goes first. Slots are in the order of their tokens.
        budget: slots that stay.
        policy: one of `POLICIES`.
        sinks: first real tokens that `streaming` keeps.
        recent: latest real tokens that `h2o` keeps whatever their score.
        scores: ``(batch, heads, slots)`` attention received, for `h2o`; equal scores prefer the older token.
    """
    slots = real.shape[-1]
    if budget >= slots:
        return torch.arange(slots, device=real.device).expand(*real.shape)
    place = torch.arange(slots, device=real.device)
    if policy == "h2o":
        if scores is None:
            raise ValueError("scores: h2o needs the attention that each token received")
        from_end = real.flip(-1).cumsum(-1).flip(-1)
        value = scores.float().masked_fill(real & (from_end <= recent), float("inf"))
        priority = value.masked_fill(~real, float("-inf"))
    else:
        priority = torch.where(real, place, place - slots)
        if policy == "streaming":
            rank = real.cumsum(-1) - 1
            priority = torch.where(real & (rank < sinks), place + slots, priority)
    order = priority.sort(dim=-1, descending=True, stable=True).indices
    return order[..., :budget].sort(dim=-1).values


def past_mask(real: Tensor, budget: int, policy: str, sinks: int) -> Tensor:
    """What each token sees if the cache kept `budget` tokens from the first one on: bool ``(batch, tokens, tokens)``.

    Row t: itself, and of the tokens before it those that `window` or `streaming` keep. Only `real` tokens
    ``(batch, tokens)`` count; padding sees itself and nothing else.
    """
    rank = real.long().cumsum(-1) - 1
    distance = rank[:, :, None] - rank[:, None, :]
    after = real[:, :, None] & real[:, None, :] & (distance >= 0)
    if policy == "streaming":
        seen = after & ((distance <= budget - sinks) | (rank[:, None, :] < sinks))
    else:
        seen = after & (distance <= budget)
    return seen | torch.eye(real.shape[-1], dtype=torch.bool, device=real.device)


@torch.no_grad()
def heavy_hitter_mask(weights_of: Tensor, real: Tensor, budget: int, recent: int) -> Tensor:
    """The same for H2O: bool ``(batch, kv heads, tokens, tokens)``, token after token, as eviction is greedy.

    Args:
        weights_of: ``(batch, kv heads, group, tokens, tokens)`` scaled scores before the softmax, masked where a query
            must not look.
        real: ``(batch, tokens)``.
        budget, recent: see `choose_kept`.
    """
    batch, heads, _, tokens, _ = weights_of.shape
    alive = torch.zeros(batch, heads, tokens, dtype=torch.bool, device=real.device)
    totals = torch.zeros(batch, heads, tokens, device=real.device)
    rows = []
    lowest = torch.finfo(torch.float32).min
    for t in range(tokens):
        alive[..., t] = True
        rows.append(alive.clone())
        row = weights_of[:, :, :, t].float().masked_fill(~alive[:, :, None], lowest).softmax(-1)
        totals += (row.sum(2) * real[:, t, None, None]).masked_fill(~alive, 0.0)
        if t + 1 > budget:
            living = alive & real[:, None]
            kept = choose_kept(living, budget, "h2o", recent=recent, scores=totals)
            alive = torch.zeros_like(alive).scatter_(-1, kept, True) & living
    return torch.stack(rows, dim=2)
