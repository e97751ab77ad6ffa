"""Sums over pairs of vectors, one by one."""

from __future__ import annotations

from torch import Tensor


def pair_loss(vectors: Tensor, max_cos: float) -> Tensor:
    """``sum over i != j of max(0, |w_i . w_j| - max_cos)``, differentiable."""
    total = vectors.new_zeros(())
    for i, first in enumerate(vectors):
        for j, second in enumerate(vectors):
            if i != j:
                total = total + ((first * second).sum().abs() - max_cos).clamp_min(0)
    return total


def cosines(vectors: Tensor) -> list[float]:
    """``|cos|`` of each pair, once."""
    return [
        abs(float((vectors[i] @ vectors[j]) / (vectors[i].norm() * vectors[j].norm())))
        for i in range(len(vectors))
        for j in range(i)
    ]
