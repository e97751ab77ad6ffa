"""The products of `_expert_rows` on CUDA: two Triton kernels, each listed row read once, sums in float32.

Checked in Triton's interpreter against the naive form; not run on a GPU here, and its tile sizes are not tuned. The
activation between the two products stays outside: it touches one number for each row, so that a fused kernel would
read as many bytes. No two programs write to one place, so results do not change from run to run.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # type: ignore[import-not-found]
import triton.language as tl  # type: ignore[import-not-found]
from torch import Tensor

__all__ = ["dots", "segment_sums", "sums"]

ROWS = 16
"""Rows that a program has under way at once."""
WIDEST = 256
"""Features of a row that a program has under way at once."""


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _dots_kernel(
    x: Any,
    table: Any,
    indices: Any,
    out: Any,
    listed: Any,
    dim: Any,
    ROW_BLOCK: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    SUM: tl.constexpr,
) -> None:
    bag = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
    there = place < listed
    rows = tl.load(indices + bag * listed + place, mask=there, other=0)
    total = tl.zeros((ROW_BLOCK,), dtype=SUM)
    for start in range(0, dim, DIM_BLOCK):
        feature = start + tl.arange(0, DIM_BLOCK)
        inside = feature < dim
        token = tl.load(x + bag * dim + feature, mask=inside, other=0).to(SUM)
        values = tl.load(
            table + rows[:, None] * dim + feature[None, :], mask=there[:, None] & inside[None, :], other=0
        ).to(SUM)
        total += tl.sum(values * token[None, :], axis=1)
    tl.store(out + bag * listed + place, total.to(out.dtype.element_ty), mask=there)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _sums_kernel(
    weights: Any,
    table: Any,
    rows_listed: Any,
    starts: Any,
    out: Any,
    dim: Any,
    ROW_BLOCK: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    SUM: tl.constexpr,
) -> None:
    segment = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * DIM_BLOCK + tl.arange(0, DIM_BLOCK)
    inside = feature < dim
    stop = tl.load(starts + segment + 1)
    total = tl.zeros((DIM_BLOCK,), dtype=SUM)
    for first in range(tl.load(starts + segment), stop, ROW_BLOCK):
        place = first + tl.arange(0, ROW_BLOCK)
        there = place < stop
        rows = tl.load(rows_listed + place, mask=there, other=0)
        share = tl.load(weights + place, mask=there, other=0).to(SUM)
        values = tl.load(
            table + rows[:, None] * dim + feature[None, :], mask=there[:, None] & inside[None, :], other=0
        ).to(SUM)
        total += tl.sum(values * share[:, None], axis=0)
    tl.store(out + segment * dim + feature, total.to(out.dtype.element_ty), mask=inside)


def dots(x: Tensor, table: Tensor, indices: Tensor) -> Tensor:
    """See `_expert_rows.row_dots`; all contiguous."""
    bags, listed = indices.shape
    out = x.new_empty(bags, listed)
    grid = (bags, triton.cdiv(listed, ROWS))
    _dots_kernel[grid](x, table, indices, out, listed, x.shape[1], ROWS, _width(x.shape[1]), _sum_type(table.dtype))
    return out


def sums(weights: Tensor, table: Tensor, indices: Tensor) -> Tensor:
    """See `_expert_rows.row_sums`; all contiguous."""
    bags, listed = indices.shape
    starts = torch.arange(0, bags * listed + 1, listed, device=indices.device)
    return _segments(weights, table, indices, starts)


def segment_sums(weights: Tensor, table: Tensor, rows: Tensor, starts: Tensor) -> Tensor:
    """Weighted sums ``(segments, dim)`` of ``table[rows[starts[i]:starts[i + 1]]]``; the last ends with `rows`."""
    ends = torch.cat([starts, starts.new_full((1,), rows.numel())])
    return _segments(weights, table, rows, ends)


def _segments(weights: Tensor, table: Tensor, rows: Tensor, starts: Tensor) -> Tensor:
    dim = table.shape[1]
    width = _width(dim)
    out = table.new_empty(starts.numel() - 1, dim)
    grid = (starts.numel() - 1, triton.cdiv(dim, width))
    _sums_kernel[grid](weights, table, rows, starts, out, dim, ROWS, width, _sum_type(table.dtype))
    return out


def _width(dim: int) -> int:
    return min(WIDEST, int(triton.next_power_of_2(dim)))


def _sum_type(dtype: torch.dtype) -> Any:
    return tl.float64 if dtype == torch.float64 else tl.float32
