"""Beam search over a function that gives the next token's log-probabilities."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["beam_search"]

Next = Callable[[Tensor, Tensor], Tensor]
"""``next_scores(prefixes, rows)``: log-probabilities ``(rows, vocabulary)`` after the prefixes ``(rows, tokens)``; each
row goes on from row ``rows[i]`` of the call before."""


def beam_search(
    next_scores: Next,
    batch: int,
    *,
    beam: int,
    bos: int,
    eos: int,
    padding: int,
    max_length: int,
    length_penalty: float,
    device: torch.device,
) -> list[list[int]]:
    """The best hypothesis of each sample, without `bos` and `eos`.

    A hypothesis of `n` tokens (`eos` counts) ranks by its log-probability over ``n ** length_penalty``, finished ones
    among those that go on; it ends when all in the beam are finished, or at `max_length` tokens.
    """
    prefixes = torch.full((batch * beam, 1), bos, device=device)
    rows = torch.arange(batch * beam, device=device)
    scores = torch.full((batch, beam), -torch.inf, device=device)
    scores[:, 0] = 0.0  # all prefixes are the same at the start
    lengths = torch.zeros(batch, beam, device=device)
    done = torch.zeros(batch, beam, dtype=torch.bool, device=device)
    first = torch.arange(batch, device=device)[:, None] * beam
    for _ in range(max_length):
        following = next_scores(prefixes, rows).float().view(batch, beam, -1)
        vocabulary = following.shape[-1]
        stay = torch.full((vocabulary,), -torch.inf, device=device)
        stay[padding] = 0.0
        following[..., [padding, bos]] = -torch.inf
        total = scores[..., None] + torch.where(done[..., None], stay, following)
        longer = lengths + (~done).float()
        ranked = total / longer.clamp_min(1)[..., None] ** length_penalty
        best = ranked.flatten(1).topk(beam).indices
        parent, token = best // vocabulary, best % vocabulary
        scores, lengths = total.flatten(1).gather(1, best), longer.gather(1, parent)
        done = done.gather(1, parent) | (token == eos)
        rows = (first + parent).flatten()
        prefixes = torch.cat([prefixes[rows], token.flatten()[:, None]], 1)
        if bool(done.all()):
            break
    final = (scores / lengths.clamp_min(1) ** length_penalty).argmax(1)
    chosen = prefixes.view(batch, beam, -1)[torch.arange(batch, device=device), final, 1:].tolist()
    return [[t for t in row[: row.index(eos) if eos in row else None] if t != padding] for row in chosen]
