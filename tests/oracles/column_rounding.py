"""GPTQ and SparseGPT as their papers write them: float64, one column at a time, an explicit inverse that shrinks."""

from __future__ import annotations

import torch
from torch import Tensor


def damped(gram: Tensor, tokens: int, damping: float = 0.01) -> Tensor:
    """``H`` of the paper, float64, for a gram without dead inputs."""
    moments = 2.0 / tokens * gram.double()
    return moments + damping * moments.diagonal().mean() * torch.eye(len(moments), dtype=torch.float64)


def eliminate(inverse: Tensor, column: int) -> Tensor:
    """The inverse of H without this column: one step of Gaussian elimination."""
    return inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]


def round_columns(
    weight: Tensor, moments: Tensor, scale: Tensor, zero: Tensor | None, bits: int, order: list[int]
) -> Tensor:
    """Codes ``(out, in)`` of `weight` ``(out, in)``; `scale` and `zero` stand for every single weight ``(out, in)``."""
    work, inverse = weight.double().clone(), torch.linalg.inv(moments)
    codes = torch.zeros_like(work)
    shift = torch.zeros_like(work) if zero is None else zero.double()
    for column in order:
        for row in range(len(work)):
            code = round(float(work[row, column].float() / scale[row, column])) + float(shift[row, column])
            codes[row, column] = min(max(code, -(2 ** (bits - 1))), 2 ** (bits - 1) - 1)
        value = (codes[:, column] - shift[:, column]) * scale[:, column].double()
        spread = (work[:, column] - value) / inverse[column, column]
        work -= torch.outer(spread, inverse[column])
        inverse = eliminate(inverse, column)
    return codes


def prune_columns(
    weight: Tensor, moments: Tensor, sparsity: float, block: int, pattern: str = "unstructured"
) -> tuple[Tensor, Tensor]:
    """SparseGPT without rounding: values and kept mask ``(out, in)``."""
    work = weight.double().clone()
    out, in_ = work.shape
    upper = torch.linalg.cholesky(torch.linalg.inv(moments), upper=True)
    inverse = torch.linalg.inv(moments)
    kept = torch.ones_like(work, dtype=torch.bool)
    zeros = int(sparsity * out * in_)
    every = 4 if pattern == "2:4" else block
    for column in range(in_):
        if column % every == 0:
            stop = min(column + every, in_)
            saliency = (work[:, column:stop] / upper.diagonal()[column:stop]) ** 2
            if pattern == "2:4":
                for row in range(out):
                    for weakest in saliency[row].argsort()[:2].tolist():
                        kept[row, column + weakest] = False
            else:
                number = zeros * stop // in_ - zeros * column // in_
                weakest_first = saliency.flatten().argsort()[:number]
                chosen = torch.ones(saliency.numel(), dtype=torch.bool)
                chosen[weakest_first] = False
                kept[:, column:stop] = chosen.view(saliency.shape)
        value = work[:, column] * kept[:, column]
        spread = (work[:, column] - value) / inverse[column, column]
        work -= torch.outer(spread, inverse[column])
        work[:, column] = value
        inverse = eliminate(inverse, column)
    return work, kept
