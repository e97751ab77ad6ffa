"""Relevance rules, element by element."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["add_loop", "linear_loop", "matmul_loop"]


def linear_loop(x: Tensor, weight: Tensor, relevance: Tensor, alpha: float = 1.0) -> Tensor:
    """The alpha-beta rule for ``x`` (samples, in), ``weight`` (out, in), in loops."""
    found = torch.zeros_like(x)
    for n in range(len(x)):
        for j in range(len(weight)):
            products = [float(x[n, i] * weight[j, i]) for i in range(x.shape[1])]
            up = sum(p for p in products if p > 0)
            down = sum(p for p in products if p < 0)
            for i, p in enumerate(products):
                if p > 0 and up:
                    found[n, i] += alpha * p / up * relevance[n, j]
                if p < 0 and down:
                    found[n, i] -= (alpha - 1) * p / down * relevance[n, j]
    return found


def matmul_loop(a: Tensor, b: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
    """Half of each output's relevance to either factor, in proportion to the products; matrices."""
    left, right = torch.zeros_like(a), torch.zeros_like(b)
    for i in range(a.shape[0]):
        for j in range(b.shape[1]):
            whole = float(a[i] @ b[:, j])
            for k in range(a.shape[1]):
                part = float(a[i, k] * b[k, j]) / whole * float(relevance[i, j]) / 2
                left[i, k] += part
                right[k, j] += part
    return left, right


def add_loop(a: Tensor, b: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
    """The rule of a sum with rescaled totals, sample by sample; ``(samples, values)``."""
    first, second = torch.zeros_like(a), torch.zeros_like(b)
    for n in range(len(a)):
        r1 = [float(a[n, i] / (a[n, i] + b[n, i]) * relevance[n, i]) for i in range(a.shape[1])]
        r2 = [float(b[n, i] / (a[n, i] + b[n, i]) * relevance[n, i]) for i in range(a.shape[1])]
        size, total = abs(sum(r1)) + abs(sum(r2)), float(relevance[n].sum())
        for i in range(a.shape[1]):
            first[n, i] = r1[i] * abs(sum(r1)) / size * total / sum(r1)
            second[n, i] = r2[i] * abs(sum(r2)) / size * total / sum(r2)
    return first, second
