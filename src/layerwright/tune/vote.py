"""One prediction from all exits of a model (Yu et al., 2024, EDGE-LLM)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from layerwright.core.errors import InputError
from layerwright.nn.exits import ExitModel

__all__ = ["VoteRule", "fit_temperatures", "generate_voted", "vote"]

VoteRule = Literal["max", "mean", "entropy"]


def vote(
    logits: Tensor,
    rule: VoteRule = "max",
    *,
    temperatures: Tensor | Sequence[float] | None = None,
    choices: Sequence[int] | Tensor | None = None,
) -> Tensor:
    """Probabilities ``(..., vocabulary)`` from the logits ``(exits, ..., vocabulary)`` of all exits.

    ``max`` takes each entry's largest probability over the exits and divides by their sum: the most confident exit
    decides. ``mean`` averages; ``entropy`` averages with weights ``softmax(-entropy)`` for each token. Computed in
    float32.

    Args:
        logits: of `ExitModel.all_exits`.
        rule: see above.
        temperatures: one for each exit, that its logits are divided by (`fit_temperatures`).
        choices: entries of the vocabulary to choose between; the others get 0, before exits are combined.

    Raises:
        InputError: another rule, no exits, temperatures that are not positive, or choices outside the vocabulary.
    """
    if rule not in get_args(VoteRule):
        raise InputError(f"rule: got {rule!r}, expected {', '.join(get_args(VoteRule))}")
    if logits.dim() < 2 or not logits.shape[0]:
        raise InputError(f"logits: got shape {tuple(logits.shape)}, expected (exits, ..., vocabulary)")
    scores = logits.float()
    if temperatures is not None:
        scale = torch.as_tensor(temperatures, dtype=torch.float32, device=scores.device)
        if scale.shape != scores.shape[:1] or not bool((scale > 0).all()):
            raise InputError(f"temperatures: expected {scores.shape[0]} positive numbers, got {scale.tolist()}")
        scores = scores / scale.view(-1, *[1] * (scores.dim() - 1))
    if choices is not None:
        scores = _restricted(scores, torch.as_tensor(choices, dtype=torch.int64, device=scores.device))
    probabilities = scores.softmax(-1)
    if rule == "max":
        combined = probabilities.amax(0)
    elif rule == "mean":
        combined = probabilities.mean(0)
    else:
        entropy = torch.special.entr(probabilities).sum(-1, keepdim=True)
        combined = (probabilities * (-entropy).softmax(0)).sum(0)
    return combined / combined.sum(-1, keepdim=True)


def _restricted(scores: Tensor, chosen: Tensor) -> Tensor:
    if not chosen.numel() or bool((chosen < 0).any()) or bool((chosen >= scores.shape[-1]).any()):
        raise InputError(f"choices: got {chosen.tolist()}, expected entries from 0 to {scores.shape[-1] - 1}")
    kept = torch.zeros(scores.shape[-1], dtype=torch.bool, device=scores.device)
    kept[chosen] = True
    return scores.masked_fill(~kept, float("-inf"))


@torch.no_grad()
def fit_temperatures(
    logits: Tensor, labels: Tensor, *, low: float = 0.25, high: float = 4.0, steps: int = 40
) -> Tensor:
    """The temperature of each exit with the least cross entropy on held-out tokens, by golden section on its logarithm.

    Exits that were trained last are otherwise favoured: they are surer of themselves, not more often right.

    Args:
        logits: ``(exits, tokens, vocabulary)``.
        labels: ``(tokens,)``.
        low, high: bounds.
        steps: halvings, each a pass over the logits.

    Returns:
        ``(exits,)`` float32.

    Raises:
        InputError: shapes that do not fit.
    """
    if logits.dim() != 3 or labels.shape != logits.shape[1:2]:
        raise InputError(
            f"labels: got {tuple(labels.shape)} for logits {tuple(logits.shape)}, expected (exits, tokens, vocabulary)"
        )
    golden = (5**0.5 - 1) / 2
    left = torch.full((logits.shape[0],), low).log()
    right = torch.full((logits.shape[0],), high).log()

    def losses(points: Tensor) -> Tensor:
        scores = (logits.float() / points.exp().to(logits.device).view(-1, 1, 1)).log_softmax(-1)
        return -scores.gather(-1, labels.view(1, -1, 1).expand(len(scores), -1, 1)).mean((1, 2)).cpu()

    inner, outer = right - golden * (right - left), left + golden * (right - left)
    first, second = losses(inner), losses(outer)
    for _ in range(steps):
        lower = first < second
        left, right = torch.where(lower, left, inner), torch.where(lower, outer, right)
        inner, outer = right - golden * (right - left), left + golden * (right - left)
        first, second = losses(inner), losses(outer)
    return ((left + right) / 2).exp()


def generate_voted(
    model: ExitModel,
    ids: Tensor,
    tokens: int = 16,
    *,
    rule: VoteRule = "max",
    temperatures: Tensor | Sequence[float] | None = None,
) -> Tensor:
    """`ids` ``(batch, tokens)`` continued greedily by the vote of all exits, with a cache."""
    return model.generate(ids, tokens, combine=partial(vote, rule=rule, temperatures=temperatures))
