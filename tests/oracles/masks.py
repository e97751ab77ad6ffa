"""Pruning masks with loops."""

from __future__ import annotations

import torch
from torch import Tensor


def wanda(weight: Tensor, inputs: Tensor, removed: list[int]) -> Tensor:
    """Kept mask of `weight` ``(out, in)``: row `r` loses ``removed[r]`` weights of least ``|w| ||x||``."""
    kept = torch.ones_like(weight, dtype=torch.bool)
    for row in range(weight.shape[0]):
        scores = [
            (abs(float(weight[row, column])) * float(inputs[:, column].norm()), column)
            for column in range(weight.shape[1])
        ]
        for _, column in sorted(scores)[: removed[row]]:
            kept[row, column] = False
    return kept


def two_of_four(scores: Tensor) -> Tensor:
    """The two best of every four; of equal ones, the later."""
    kept = torch.zeros_like(scores, dtype=torch.bool)
    for row in range(scores.shape[0]):
        for start in range(0, scores.shape[1], 4):
            ranked = sorted((float(scores[row, start + i]), i) for i in range(4))
            for _, i in ranked[2:]:
                kept[row, start + i] = True
    return kept
