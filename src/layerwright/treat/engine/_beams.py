"""Beam search with the rules of transformers: which hypotheses go on, which are complete, when it ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from layerwright.treat.engine._sampling import Sampling

if TYPE_CHECKING:
    from layerwright.treat.engine._model import InferenceModel

__all__ = ["search"]

_NEVER = -1e9


@dataclass
class _Hypotheses:
    """`tokens` ``(n, beams, count)``, `lengths` and `scores` ``(n, beams)`` in falling order of score."""

    tokens: Tensor
    lengths: Tensor
    scores: Tensor

    def chosen(self, places: Tensor) -> _Hypotheses:
        """Those at `places` ``(n, k)`` of each prompt."""
        tokens = self.tokens.gather(1, places[..., None].expand(-1, -1, self.tokens.shape[2]))
        return _Hypotheses(tokens, self.lengths.gather(1, places), self.scores.gather(1, places))

    def joined(self, other: _Hypotheses) -> _Hypotheses:
        """Both, side by side."""
        parts = zip((self.tokens, self.lengths, self.scores), (other.tokens, other.lengths, other.scores), strict=True)
        return _Hypotheses(*(torch.cat(pair, 1) for pair in parts))


def search(
    engine: InferenceModel, logits: Tensor, count: int, sampling: Sampling, fill: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The best hypothesis of each prompt after `prefill`: new tokens ``(n, count)``, lengths and scores ``(n,)``.

    The prompt is read once for all beams of it, and later only the places after the prompt are copied when beams
    change rows.

    Args:
        engine: holds the prompts.
        logits: after them, ``(n, vocabulary)``.
        count: new tokens at most.
        sampling: number of beams, length penalty, rule of stopping.
        fill: token that fills up what ended.
    """
    prompts, beams, device = logits.shape[0], sampling.num_beams, logits.device
    ends = torch.tensor(engine.eos_token_ids, device=device)
    keep = max(2, 1 + len(ends)) * beams
    empty = torch.full((prompts, beams, count), fill, device=device)
    zeros = torch.zeros(prompts, beams, dtype=torch.long, device=device)
    running = _Hypotheses(empty, zeros, torch.full((prompts, beams), _NEVER, device=device))
    running.scores[:, 0] = 0.0  # all beams of a prompt are equal at first: one of them counts
    complete = _Hypotheses(empty.clone(), zeros, torch.full((prompts, beams), _NEVER, device=device))
    finished = torch.zeros(prompts, beams, dtype=torch.bool, device=device)
    hopeful = torch.ones(prompts, 1, dtype=torch.bool, device=device)
    rows = torch.arange(prompts, device=device).repeat_interleave(beams)
    logits, prompt = logits[rows], engine.cache.length
    engine.reorder(rows)
    for made in range(1, count + 1):
        followed, origin = _continued(running, logits, keep, made)
        stops = torch.isin(followed.tokens[:, :, made - 1], ends) | (made == count)
        followed_scores = followed.scores
        running_scores = followed_scores + stops * _NEVER
        places = running_scores.topk(beams).indices
        merged, done = _merge(complete, finished, followed, stops, hopeful, made, sampling)
        running = followed.chosen(places)
        running.scores = running_scores.gather(1, places)
        complete, finished = merged, done
        hopeful = hopeful & _may_improve(running, complete, finished, made, count, sampling)
        over = bool(finished.all()) and sampling.early_stopping is True
        if bool(stops.all()) or over or not bool(hopeful.any()):
            break
        base = torch.arange(prompts, device=device)[:, None] * beams
        engine.reorder((base + origin.gather(1, places)).flatten(), since=prompt)
        logits = engine.step(running.tokens[:, :, made - 1].flatten())
    return complete.tokens[:, 0], complete.lengths[:, 0], complete.scores[:, 0]


def _continued(running: _Hypotheses, logits: Tensor, keep: int, made: int) -> tuple[_Hypotheses, Tensor]:
    """The `keep` likeliest continuations of each prompt by one token, and the beams ``(n, keep)`` that they go on from."""
    prompts, beams = running.scores.shape
    steps = logits.float().log_softmax(-1).view(prompts, beams, -1)
    sums = (steps + running.scores[..., None]).flatten(1)
    scores, places = sums.topk(keep)
    origin, token = places // steps.shape[-1], places % steps.shape[-1]
    found = running.chosen(origin)
    found.tokens[:, :, made - 1] = token
    return _Hypotheses(found.tokens, torch.full_like(origin, made), scores), origin


def _merge(
    complete: _Hypotheses,
    finished: Tensor,
    followed: _Hypotheses,
    stops: Tensor,
    hopeful: Tensor,
    made: int,
    sampling: Sampling,
) -> tuple[_Hypotheses, Tensor]:
    """The best complete hypotheses so far, and which of their places are taken."""
    beams = complete.scores.shape[1]
    ended = stops.clone()
    ended[:, beams:] = False  # the others are there so that enough go on
    scores = followed.scores / made**sampling.length_penalty
    full = finished.all(1, keepdim=True) & (sampling.early_stopping is True)
    scores = scores + (full.float() + (~hopeful).float()) * _NEVER + (~ended).float() * _NEVER
    candidates = complete.joined(_Hypotheses(followed.tokens, followed.lengths, scores))
    places = candidates.scores.topk(beams).indices
    return candidates.chosen(places), torch.cat([finished, ended], 1).gather(1, places)


def _may_improve(
    running: _Hypotheses, complete: _Hypotheses, finished: Tensor, made: int, count: int, sampling: Sampling
) -> Tensor:
    """Whether a hypothesis that goes on can still be better than the worst complete one, ``(n, 1)``."""
    longest = count if sampling.early_stopping == "never" and sampling.length_penalty > 0 else made
    best = running.scores[:, :1] / longest**sampling.length_penalty
    worst = torch.where(finished, complete.scores.min(1, keepdim=True).values, _NEVER)
    return (best > worst).any(1, keepdim=True)
