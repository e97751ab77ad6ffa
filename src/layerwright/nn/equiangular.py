"""Unit vectors that are as far from parallel to one another as their number and dimension allow (Shen et al., 2023)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from layerwright.core.errors import InputError

__all__ = ["EBVResult", "PairHinge", "generate_ebv", "measure_cosines", "pair_hinge", "welch_bound"]

TOLERANCE = 1e-4
"""By how much the largest cosine may pass its limit."""
_PATIENCE, _SHRINK, _LARGEST_MOVE = 200, 0.95, 0.2


@dataclass(frozen=True)
class EBVResult:
    """Vectors and how near to orthogonal they are.

    Attributes:
        vectors: ``(n, d)``, rows of length 1.
        max_cos: the largest ``|cos|`` between two of them, measured in float64.
        mean_cos: the mean ``|cos|`` over all pairs.
        steps: of gradient descent that were taken; 0 where the vectors are orthonormal.
        feasible: whether the limit that was asked for is kept to within 1e-4; true where none was.
    """

    vectors: Tensor
    max_cos: float
    mean_cos: float
    steps: int
    feasible: bool


@dataclass(frozen=True)
class PairHinge:
    """What `pair_hinge` gives: the loss, its gradient ``(n, d)``, the largest and the mean ``|cos|`` of a pair."""

    loss: float
    gradient: Tensor
    largest: float
    mean: float


def welch_bound(n: int, d: int) -> float:
    """The least possible largest ``|cos|`` among `n` unit vectors of `d` dimensions: ``sqrt((n - d) / (d (n - 1)))``.

    Zero for ``n <= d``; reached by equiangular tight frames alone. Source: Welch, "Lower bounds on the maximum cross
    correlation of signals" (1974).

    Raises:
        InputError: fewer than one vector or dimension.
    """
    if n < 1 or d < 1:
        raise InputError(f"n, d: got {n} and {d}, expected at least 1")
    return math.sqrt((n - d) / (d * (n - 1))) if n > d else 0.0


def pair_hinge(vectors: Tensor, max_cos: float, slice_size: int = 1024) -> PairHinge:
    """``sum over i != j of relu(|w_i . w_j| - max_cos)`` and its gradient, each pair twice, as published.

    Reads `slice_size` rows of the Gram matrix at a time: ``4 n^2 d`` multiply-adds, memory for ``slice_size n``
    numbers. Only pairs above the limit pull. Source: Shen et al., "Equiangular Basis Vectors" (2023, arXiv 2303.11637).

    Args:
        vectors: ``(n, d)``, taken to be unit vectors.
        max_cos: the limit.
        slice_size: rows at a time, at least 1.
    """
    count = len(vectors)
    gradient = torch.empty_like(vectors)
    loss = vectors.new_zeros((), dtype=torch.float64)
    total, largest = torch.zeros_like(loss), vectors.new_zeros(())
    for rows, cosines in _gram_slices(vectors, slice_size):
        sizes = cosines.abs()
        pulls = cosines.sign().mul_(sizes > max_cos)
        torch.mm(pulls, vectors, out=gradient[rows])
        largest = torch.maximum(largest, sizes.max())
        total += sizes.sum(dtype=torch.float64)
        loss += sizes.sub_(max_cos).clamp_min_(0).sum(dtype=torch.float64)
    return PairHinge(float(loss), gradient.mul_(2), float(largest), float(total) / max(1, count * (count - 1)))


def _gram_slices(vectors: Tensor, slice_size: int) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the matrix of cosines, with zeros for those of a vector with itself."""
    for start in range(0, len(vectors), slice_size):
        rows = slice(start, min(len(vectors), start + slice_size))
        cosines = vectors[rows] @ vectors.T
        cosines.diagonal(start).zero_()
        yield rows, cosines


def generate_ebv(
    n: int,
    d: int,
    max_cos: float | None = None,
    steps: int = 3000,
    lr: float = 1e-2,
    slice_size: int = 1024,
    anneal: bool = True,
    seed: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    strict: bool = False,
) -> EBVResult:
    """`n` unit vectors of `d` dimensions with ``|cos|`` of every pair small: orthonormal for ``n <= d``, else by descent.

    Descent on `pair_hinge` from random directions; all rows are brought back to length 1 after each step. With
    `anneal`, the limit begins at twice the Welch bound and falls by a twentieth as often as it is kept, down to
    `max_cos`; the best vectors met are the result. Where two vectors collapse into one another, or nothing improves for
    200 steps, it goes on from the best ones with half the rate. Each step takes ``4 n^2 d`` multiply-adds.

    Source: Shen et al., "Equiangular Basis Vectors" (2023, arXiv 2303.11637); annealing, the turn back and the bound on
    a row's step (a fifth of its length) are additions.

    Args:
        n: vectors.
        d: dimensions.
        max_cos: limit to reach, between the Welch bound and 1; as low as `steps` allow if left out.
        steps: at most so many.
        lr: rate of the first steps.
        slice_size: rows of the matrix of cosines in memory at a time.
        anneal: see above; without it `max_cos` is the limit from the start.
        seed: of the random start; the same seed gives the same vectors on the same machine.
        device: where to work and leave the result.
        dtype: float32 or float64.
        strict: raise where `max_cos` is not reached, instead of a warning.

    Raises:
        InputError: a number outside its range, `max_cos` below the Welch bound, or not reached under `strict`.
    """
    bound = welch_bound(n, d)
    _check(n, d, max_cos, steps, lr, slice_size, anneal, dtype, bound)
    draw = torch.Generator().manual_seed(seed)
    start = torch.randn(n, d, generator=draw, dtype=torch.float64, device="cpu")
    if n <= d:
        vectors, used = torch.linalg.qr(start.T).Q.T.contiguous().to(device=device, dtype=dtype), 0
    else:
        unit = functional.normalize(start, dim=1).to(device=device, dtype=dtype)
        vectors, used = _descend(unit, bound, max_cos, steps, lr, slice_size, anneal)
    largest, mean = measure_cosines(vectors, slice_size)
    feasible = max_cos is None or largest <= max_cos + TOLERANCE
    if not feasible:
        line = (
            f"max_cos: {max_cos:g} was not reached for {n} vectors of {d} dimensions in {used} steps (got {largest:.4f}; "
            f"the Welch bound is {bound:.4f}); take more steps, a larger max_cos, or more dimensions"
        )
        if strict:
            raise InputError(line)
        warnings.warn(line, stacklevel=2)
    return EBVResult(vectors, largest, mean, used, feasible)


def _check(
    n: int, d: int, max_cos: float | None, steps: int, lr: float, slice_size: int, anneal: bool, dtype: torch.dtype,
    bound: float,
) -> None:  # fmt: skip
    if steps < 1 or slice_size < 1:
        raise InputError(f"steps, slice_size: got {steps} and {slice_size}, expected at least 1")
    if not lr > 0:
        raise InputError(f"lr: got {lr}, expected a positive number")
    if dtype not in (torch.float32, torch.float64):
        raise InputError(f"dtype: got {dtype}, expected torch.float32 or torch.float64")
    if max_cos is None:
        if n > d and not anneal:
            raise InputError(f"max_cos: needed without anneal; expected a number above the Welch bound {bound:.4f}")
    elif not bound <= max_cos < 1:
        raise InputError(
            f"max_cos: got {max_cos}, expected at least the Welch bound {bound:.4f} of {n} vectors of {d} dimensions, below 1"
        )


def _descend(
    start: Tensor, bound: float, max_cos: float | None, steps: int, lr: float, slice_size: int, anneal: bool
) -> tuple[Tensor, int]:
    """The best vectors met and the steps taken."""
    target = bound if max_cos is None else max_cos
    limit = max(target, 2 * bound) if anneal else target
    vectors = best = start
    least = first = math.inf
    rate, stuck = lr, 0
    for step in range(steps):
        found = pair_hinge(vectors, limit, slice_size)
        if not step:
            first = found.largest
        if found.largest < least:
            best, least, stuck = vectors, found.largest, 0
        while limit > target and found.largest <= limit + TOLERANCE:
            limit, stuck = max(target, _SHRINK * limit), 0
            found = pair_hinge(vectors, limit, slice_size)
        if found.largest <= target + TOLERANCE:
            return best, step
        stuck += 1
        # At a cosine of 1 the pull has no tangential part: collapsed vectors would never part again.
        if found.largest > first or stuck > _PATIENCE:
            rate, vectors, stuck = rate / 2, best, 0
            if rate < lr / 100:
                return best, step
            continue
        vectors = _moved(vectors, found.gradient, rate)
    return best, steps


def _moved(vectors: Tensor, gradient: Tensor, rate: float) -> Tensor:
    """Unit vectors after a step along the sphere, no row by more than `_LARGEST_MOVE`."""
    along = gradient - (gradient * vectors).sum(1, keepdim=True) * vectors
    move = rate * along
    move *= (_LARGEST_MOVE / move.norm(dim=1, keepdim=True).clamp_min(1e-12)).clamp_max(1)
    return functional.normalize(vectors - move, dim=1)


def measure_cosines(vectors: Tensor, slice_size: int = 1024) -> tuple[float, float]:
    """The largest and the mean ``|cos|`` over all pairs of unit vectors ``(n, d)``, in float64."""
    largest, total, count = 0.0, 0.0, len(vectors)
    for _, cosines in _gram_slices(vectors.double() if vectors.device.type != "mps" else vectors, slice_size):
        sizes = cosines.abs_()
        largest, total = max(largest, float(sizes.max())), total + float(sizes.sum())
    return largest, total / max(1, count * (count - 1))
