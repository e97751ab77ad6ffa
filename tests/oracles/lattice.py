"""The best rounding there is, by trying every one."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def best_codes(row: Tensor, gram: Tensor, scale: float, bits: int) -> tuple[Tensor, float]:
    """Codes ``(in,)`` that minimise ``(w - s q) G (w - s q)`` over the whole symmetric grid, and that minimum."""
    levels = range(-(2 ** (bits - 1)), 2 ** (bits - 1))
    every = torch.tensor(list(itertools.product(levels, repeat=len(row))), dtype=torch.float64)
    error = row.double() - every * scale
    losses = torch.einsum("ci,ij,cj->c", error, gram.double(), error)
    best = int(losses.argmin())
    return every[best], float(losses[best])


def best_clip(x: Tensor, bits: int, candidates: int = 10_000) -> float:
    """Clipping point of the least squared error of symmetric rounding of all `x`, by trying `candidates`."""
    qmax, qmin = 2 ** (bits - 1) - 1, -(2 ** (bits - 1))
    points = torch.linspace(float(x.abs().max()) / candidates, float(x.abs().max()), candidates)
    losses = []
    for point in points:
        scale = point / ((qmax - qmin) / 2)
        losses.append(float(((x / scale).round().clamp(qmin, qmax) * scale - x).square().mean()))
    return float(points[int(torch.tensor(losses).argmin())])
