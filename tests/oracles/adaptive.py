"""Adaptive computation modules the slow, obvious way: one token after the other, no sums shared."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from layerwright.nn.adaptive import ACTIVATIONS, AdaptiveComputationModule

__all__ = ["budget", "diversity", "entropy", "label", "prefix"]


def prefix(module: AdaptiveComputationModule, token: Tensor, count: int) -> Tensor:
    """Output of the first `count` learners for one token, learner by learner."""
    width = module.hidden_per_learner
    result = torch.zeros(module.out_dim, dtype=token.dtype)
    if module.out_bias is not None:
        for k in range(count + 1):
            result = result + module.out_bias[k]
    for n in range(count):
        rows = slice(n * width, (n + 1) * width)
        hidden = module.up.weight[rows] @ token
        if module.up.bias is not None:
            hidden = hidden + module.up.bias[rows]
        result = result + module.down.weight[:, rows] @ ACTIVATIONS[module.activation](hidden)
    return result


def label(errors: list[float], threshold: float, smallest: int = 0) -> int:
    """The first number of learners after which one more helps by less than the factor."""
    for k in range(smallest, len(errors) - 1):
        if errors[k] == 0 or errors[k] / errors[k + 1] < threshold if errors[k + 1] else errors[k] == 0:
            return k
    return len(errors) - 1


def budget(numbers: list[list[list[int]]], real: list[list[bool]], costs: list[float], learners: int) -> float:
    """Share of all learners' cost that real tokens use; `numbers` by module, sample, token."""
    spent = 0.0
    for cost, module in zip(costs, numbers, strict=True):
        kept = [
            k for row, keep in zip(module, real, strict=True) for k, is_real in zip(row, keep, strict=True) if is_real
        ]
        spent += cost * sum(kept) / len(kept)
    return spent / sum(cost * learners for cost in costs)


def entropy(numbers: list[list[list[int]]], real: list[list[bool]], learners: int) -> float:
    """Minus the mean entropy of the choices in a sample, over the largest one."""
    values = []
    for module in numbers:
        for row, keep in zip(module, real, strict=True):
            kept = [k for k, is_real in zip(row, keep, strict=True) if is_real]
            shares = [kept.count(k) / len(kept) for k in range(learners + 1)]
            values.append(-sum(p * math.log(p) for p in shares if p) / math.log(learners + 1))
    return -sum(values) / len(values)


def diversity(numbers: list[list[list[int]]], real: list[list[bool]], learners: int) -> float:
    """Minus twice the mean difference of two samples' mean numbers of learners, over the number of choices."""
    u = []
    for sample, keep in enumerate(real):
        kept = [module[sample][t] for module in numbers for t, is_real in enumerate(keep) if is_real]
        u.append(sum(kept) / len(kept) / (learners + 1))
    return -2 * sum(abs(a - b) for a in u for b in u) / len(u) ** 2
