"""Which experts of a mixture serve a token, and how much each counts: adaptive threshold, fixed threshold, top-k."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["ExpertChoice", "ExpertRouting", "balance_loss", "choose_above", "choose_adaptive", "choose_top"]

ExpertRouting = Literal["adaptive", "top-k", "threshold", "none"]


@dataclass(frozen=True)
class ExpertChoice:
    """What a gate decided for ``(tokens, experts)``.

    Attributes:
        weights: 0 for experts that do not serve a token; they sum to 1, or to 0 where no expert serves it.
        selected: boolean.
        scores: what the gate gave: margins over the threshold where there is a learned one, else probabilities.
        probabilities: of the gate's softmax.
    """

    weights: Tensor
    selected: Tensor
    scores: Tensor
    probabilities: Tensor


def choose_adaptive(probabilities: Tensor, thresholds: Tensor) -> ExpertChoice:
    """Experts whose probability reaches the token's threshold, weighted by their margins over it.

    ``e = p - tau``, ``w_i = e_i 1[e_i >= 0] / sum_j e_j 1[e_j >= 0]`` (Liu and Luo, 2024, AdaMoLE). An expert that just
    reaches the threshold comes in with weight 0, so that the weights are continuous; where the sum is 0 all are 0.

    Args:
        probabilities: ``(tokens, experts)``.
        thresholds: ``(tokens, 1)``.
    """
    margins = probabilities - thresholds
    selected = margins >= 0
    return ExpertChoice(_shares(margins * selected), selected, margins, probabilities)


def choose_above(probabilities: Tensor, threshold: float) -> ExpertChoice:
    """Experts whose probability is at least `threshold`, weighted by their probabilities."""
    selected = probabilities >= threshold
    return ExpertChoice(_shares(probabilities * selected), selected, probabilities, probabilities)


def choose_top(probabilities: Tensor, count: int) -> ExpertChoice:
    """The `count` most probable experts of each token, weighted by their probabilities."""
    places = probabilities.topk(count, dim=-1).indices
    selected = torch.zeros_like(probabilities, dtype=torch.bool).scatter_(-1, places, True)
    return ExpertChoice(_shares(probabilities * selected), selected, probabilities, probabilities)


def balance_loss(selected: Tensor, scores: Tensor, real: Tensor | None = None) -> Tensor:
    """``experts * sum_i f_i q_i``: shares of tokens times mean scores (Fedus et al., 2021, Switch Transformer).

    The gradient passes through the scores alone. 1 for a uniform gate over probabilities and one expert per token;
    with margins for scores it can be negative.

    Args:
        selected: boolean, ``(tokens, experts)``.
        scores: the same shape; margins or probabilities.
        real: boolean ``(tokens,)``, tokens that count; all by default.
    """
    counted = torch.ones_like(scores[:, :1]) if real is None else real[:, None].to(scores.dtype)
    tokens = counted.sum().clamp(min=1)
    shares = (selected.to(scores.dtype) * counted).sum(0) / tokens
    means = (scores * counted).sum(0) / tokens
    return scores.shape[1] * (shares * means).sum()


def _shares(values: Tensor) -> Tensor:
    total = values.sum(-1, keepdim=True)
    return values / torch.where(total == 0, torch.ones_like(total), total)
