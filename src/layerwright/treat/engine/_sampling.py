"""How the next token is chosen from logits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from layerwright.core.errors import InputError

__all__ = ["Sampling", "choose", "warp"]


@dataclass(frozen=True)
class Sampling:
    """Greedy by default; with a temperature above 0, drawn from what `top_k` and `top_p` leave; with beams, searched.

    Attributes:
        temperature: 0 for the most likely token, else what logits are divided by.
        top_k: so many likeliest tokens stay; 0 for all.
        top_p: the fewest likeliest tokens whose probability exceeds it stay, above 0 and at most 1.
        num_beams: 1, or hypotheses that are followed at once (temperature 0).
        length_penalty: a hypothesis' score is divided by its new tokens to this power.
        early_stopping: when a search ends: False by the best score that is still likely, True as soon as `num_beams`
            hypotheses are complete, ``never`` by the best score that is possible.

    Raises:
        InputError: a number outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InputError(f"temperature: got {self.temperature}, expected 0 (greedy) or more")
        if self.top_k < 0:
            raise InputError(f"top_k: got {self.top_k}, expected 0 (all) or more")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p: got {self.top_p}, expected above 0 and at most 1")
        if self.num_beams < 1 or (self.num_beams > 1 and self.temperature > 0):
            raise InputError(f"num_beams: got {self.num_beams}, expected at least 1, and temperature 0 with more")
        if self.early_stopping not in (True, False, "never"):
            raise InputError(f"early_stopping: got {self.early_stopping!r}, expected True, False or 'never'")


def warp(logits: Tensor, sampling: Sampling) -> Tensor:
    """Float32 logits after temperature, top-k and top-p, in this order; what is ruled out is minus infinity.

    Args:
        logits: ``(n, vocabulary)``.
        sampling: with a temperature above 0.
    """
    scores = logits.float() / sampling.temperature
    if sampling.top_k:
        least = scores.topk(min(sampling.top_k, scores.shape[-1])).values[:, -1:]
        scores = scores.masked_fill(scores < least, float("-inf"))
    if sampling.top_p < 1:
        ordered, places = scores.sort(descending=False)
        ruled_out = ordered.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        ruled_out[:, -1] = False
        scores = scores.masked_fill(ruled_out.scatter(1, places, ruled_out), float("-inf"))
    return scores


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """The next token of each row ``(n,)``."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    shares = warp(logits, sampling).softmax(-1)
    return torch.multinomial(shares, 1, generator=generator)[:, 0]
