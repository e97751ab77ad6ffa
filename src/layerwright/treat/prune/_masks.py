"""Which weights stay: masks with an exact number of zeros, so that sizes can be promised."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from layerwright.core.errors import InputError
from layerwright.core.storage import kept_weights

__all__ = ["Pattern", "magnitude_mask", "removed_weights", "smallest", "spread_evenly", "two_of_four", "wanda_mask"]

Pattern = Literal["unstructured", "2:4"]


def magnitude_mask(weight: Tensor, sparsity: float, pattern: Pattern = "unstructured") -> Tensor:
    """Keep the largest weights of each matrix ``(count, out, in)``; bool, True where kept.

    Unstructured, each matrix keeps exactly `layerwright.core.storage.kept_weights`; equal weights go from the front.

    Raises:
        InputError: pattern 2:4 with a number of inputs that is not a multiple of 4.
    """
    scores = weight.float().abs()
    if pattern == "2:4":
        return two_of_four(scores)
    count, out, in_ = weight.shape
    return ~smallest(scores.flatten(1), removed_weights(out, in_, sparsity)).view(count, out, in_)


def wanda_mask(weight: Tensor, square_sum: Tensor, sparsity: float, pattern: Pattern = "unstructured") -> Tensor:
    """Keep the weights with the largest ``|w| * ||x||`` of each output row (Wanda, Sun et al., 2023).

    Rows lose equally many weights, give or take the one that makes the matrix total exact.

    Args:
        weight: ``(count, out, in)``.
        square_sum: sums of the squared inputs, ``(count, in)``, or ``(count, out, in)`` where rows differ; a row
            without any is judged by magnitude.
        sparsity: share of zeros.
        pattern: `unstructured`, or two of every four.
    """
    squares = square_sum.unsqueeze(1) if square_sum.dim() == 2 else square_sum
    norms = torch.where((squares == 0).all(-1, keepdim=True), 1.0, squares.float()).sqrt()
    scores = weight.float().abs() * norms
    if pattern == "2:4":
        return two_of_four(scores)
    _, out, in_ = weight.shape
    removed = spread_evenly(removed_weights(out, in_, sparsity), out).to(weight.device)
    return ~smallest(scores, removed.expand(weight.shape[:-1]))


def two_of_four(scores: Tensor) -> Tensor:
    """Keep the two largest of every four along the last dimension; of equal ones, the later. Bool like `scores`."""
    if scores.shape[-1] % 4:
        raise InputError(f"pattern 2:4: the {scores.shape[-1]} inputs are not a multiple of 4; use unstructured")
    four = torch.unflatten(scores, -1, (-1, 4))
    parts = four.unbind(-1)
    # A weight stays if it beats at least two of the other three; four numbers are not worth a sort.
    beaten = [
        sum((parts[i] >= parts[j]).to(torch.int8) if j < i else (parts[i] > parts[j]).to(torch.int8) for j in range(4))
        for i in range(4)
    ]
    return torch.stack([torch.as_tensor(count) >= 2 for count in beaten], -1).view(scores.shape)


def smallest(scores: Tensor, number: int | Tensor) -> Tensor:
    """Exactly the `number` smallest of every row of `scores` ``(..., n)``, bool; of equal ones, the first.

    Args:
        scores: of any shape.
        number: for all rows, or a tensor ``(...)``; each different number costs a selection of its own.
    """
    if isinstance(number, int):
        return _up_to(scores, _threshold(scores, number), number)
    number = number.unsqueeze(-1)
    thresholds = torch.full_like(scores[..., :1], -torch.inf)
    for value in torch.unique(number).tolist():
        thresholds = torch.where(number == value, _threshold(scores, value), thresholds)
    return _up_to(scores, thresholds, number)


def removed_weights(out: int, in_: int, sparsity: float) -> int:
    """Number of weights that pruning sets to zero; the complement of `layerwright.core.storage.kept_weights`."""
    return out * in_ - kept_weights(out, in_, sparsity)


def spread_evenly(total: int | Tensor, parts: int) -> Tensor:
    """`total` (a number, or ``(...)``) as `parts` whole numbers ``(..., parts)`` that differ by at most one."""
    ends = torch.as_tensor(total, dtype=torch.int64).unsqueeze(-1) * torch.arange(parts + 1) // parts
    return ends.diff()


def _threshold(scores: Tensor, number: int) -> Tensor:
    """The `number`-th smallest of each row ``(..., 1)``; below everything for 0."""
    if number == 0:
        return torch.full_like(scores[..., :1], -torch.inf)
    return scores.kthvalue(number, dim=-1, keepdim=True).values


def _up_to(scores: Tensor, threshold: Tensor, number: int | Tensor) -> Tensor:
    below = scores < threshold
    ties = scores == threshold
    missing = number - below.sum(-1, keepdim=True)
    return below | (ties & (ties.cumsum(-1) <= missing))
