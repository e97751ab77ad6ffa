"""GPTQ over whole groups of columns as its steps are written: float64, explicit inputs, an inverse that shrinks."""

from __future__ import annotations

import torch
from torch import Tensor

from oracles.column_rounding import damped, eliminate


def grid_of(values: Tensor, bits: int, symmetric: bool, ratio: float) -> tuple[float, float]:
    """Scale (as float32 holds it) and zero point of one row of one group."""
    low, high = float(values.min()), float(values.max())
    if symmetric:
        scale = max(abs(low), abs(high)) * ratio / (2 ** (bits - 1) - 1)
        return float(torch.tensor(scale).float()), 0.0
    scale = float(torch.tensor((max(high, 0.0) - min(low, 0.0)) * ratio / (2**bits - 1)).float())
    return scale, float(round(-(2 ** (bits - 1)) - min(low, 0.0) * ratio / scale))


def value(x: float, scale: float, zero: float, bits: int) -> float:
    code = min(max(round(x / scale) + zero, -(2 ** (bits - 1))), 2 ** (bits - 1) - 1)
    return (code - zero) * scale


def gptq_groups(weight: Tensor, x: Tensor, bits: int, group: int, symmetric: bool, clip: bool) -> Tensor:
    """Dequantized weight ``(rows, in)``; `x` is ``(tokens, in)``."""
    gram = x.double().T @ x.double()
    in_ = weight.shape[1]
    sums = [float(gram.diagonal()[g * group : (g + 1) * group].sum()) for g in range(in_ // group)]
    groups = sorted(range(in_ // group), key=lambda g: -sums[g])
    work, result = weight.double().clone(), torch.zeros_like(weight, dtype=torch.float64)
    inverse = torch.linalg.inv(damped(gram, len(x)))
    for g in groups:
        columns = list(range(g * group, (g + 1) * group))
        inputs = x.double()[:, columns]
        grids = []
        for row in range(len(work)):
            own, best = work[row, columns], (float("inf"), 1.0)
            for ratio in [1 - 0.02 * i for i in range(11)] if clip else [1.0]:
                scale, zero = grid_of(own, bits, symmetric, ratio)
                rounded = torch.tensor([value(float(w), scale, zero, bits) for w in own], dtype=torch.float64)
                error = float((inputs @ (own - rounded)).square().mean())
                best = min(best, (error, -ratio)) if error < best[0] - 1e-12 else best
            grids.append(grid_of(own, bits, symmetric, abs(best[1])))
        for column in columns:
            for row, (scale, zero) in enumerate(grids):
                result[row, column] = value(float(work[row, column]), scale, zero, bits)
            spread = (work[:, column] - result[:, column]) / inverse[column, column]
            work -= torch.outer(spread, inverse[column])
            inverse = eliminate(inverse, column)
    return result
