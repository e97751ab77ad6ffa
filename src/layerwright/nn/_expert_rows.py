"""Products of tokens with rows of large tables, each token with rows of its own, without gathering copies of the rows.

Two primitives and their derivatives, which are the same two again with the roles swapped: `row_dots` (a token's
products with its rows) and `row_sums` (a token's weighted sum of its rows). Bytes read: each listed row once for each
pass.
"""

from __future__ import annotations

import importlib.util
import warnings
from functools import cache, cached_property
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["Gradients", "RowBackend", "RowLists", "RowsInUse", "available_backend", "row_dots", "row_sums"]

RowBackend = Literal["naive", "bag", "triton"]
Gradients = Literal["sparse", "dense"]


class RowsInUse(NamedTuple):
    """Rows that are listed at all, and where: ``places[starts[i]:starts[i + 1]]`` are those of ``rows[i]``.

    Attributes:
        rows: ``(used,)``, ascending.
        places: positions in the flattened lists, ``(bags * listed,)``.
        starts: ``(used,)``.
    """

    rows: Tensor
    places: Tensor
    starts: Tensor


class RowLists:
    """Rows of a table that each of some bags uses.

    Args:
        indices: ``(bags, listed)`` int64, at least one of each; a row may be listed several times.
    """

    def __init__(self, indices: Tensor) -> None:
        self.indices = indices.contiguous()

    @cached_property
    def used(self) -> RowsInUse:
        """The same by row: sorted once, for the gradients of both tables."""
        ordered, places = self.indices.flatten().sort(stable=True)
        rows, counts = torch.unique_consecutive(ordered, return_counts=True)
        return RowsInUse(rows, places, counts.cumsum(0) - counts)


def available_backend(device: torch.device) -> RowBackend:
    """The fastest form that runs on `device`; under ``torch.compile`` the naive one, which it can trace."""
    if torch.compiler.is_compiling():
        return "naive"
    if device.type == "cpu":
        return "bag" if hasattr(torch.ops.aten, _DOTS) else "naive"
    return "triton" if device.type == "cuda" and importlib.util.find_spec("triton") else "naive"


def row_dots(x: Tensor, table: Tensor, lists: RowLists, backend: RowBackend, gradients: Gradients = "dense") -> Tensor:
    """``out[b, r] = x[b] . table[indices[b, r]]``: ``(bags, listed)`` in the dtype of both.

    Args:
        x: ``(bags, dim)``.
        table: ``(rows, dim)``, in the dtype of `x`.
        lists: which rows.
        backend: ``naive`` gathers (the obvious form); ``bag`` runs on the CPU, ``triton`` on CUDA, without copies.
        gradients: of `table`: ``sparse`` holds the listed rows alone (COO, each row once), ``dense`` all of them.
    """
    if backend == "naive":
        return torch.einsum("bd,brd->br", x, _gathered(table, lists, gradients))
    dots: Tensor = _RowDots.apply(x, table, lists, backend, gradients)  # type: ignore[no-untyped-call]
    return dots


def row_sums(
    weights: Tensor, table: Tensor, lists: RowLists, backend: RowBackend, gradients: Gradients = "dense"
) -> Tensor:
    """``out[b] = sum_r weights[b, r] table[indices[b, r]]``: ``(bags, dim)``.

    Args:
        weights: ``(bags, listed)``, in the dtype of `table`.
        table, lists, backend, gradients: see `row_dots`.
    """
    if backend == "naive":
        return torch.einsum("br,brd->bd", weights, _gathered(table, lists, gradients))
    sums: Tensor = _RowSums.apply(weights, table, lists, backend, gradients)  # type: ignore[no-untyped-call]
    return sums


def _gathered(table: Tensor, lists: RowLists, gradients: Gradients) -> Tensor:
    return F.embedding(lists.indices, table, sparse=gradients == "sparse")


class _RowDots(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, table: Tensor, lists: RowLists, backend: RowBackend, gradients: Gradients
    ) -> Tensor:
        ctx.save_for_backward(x, table)
        ctx.lists, ctx.backend, ctx.gradients = lists, backend, gradients
        return _dots(x, table, lists, backend)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *given: Tensor) -> tuple[Tensor | None, ...]:
        x, table = ctx.saved_tensors
        (gradient,) = given
        dx = _sums(gradient, table, ctx.lists, ctx.backend) if ctx.needs_input_grad[0] else None
        dtable = _table_gradient(ctx, x, gradient, table) if ctx.needs_input_grad[1] else None
        return dx, dtable, None, None, None


class _RowSums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weights: Tensor, table: Tensor, lists: RowLists, backend: RowBackend, gradients: Gradients
    ) -> Tensor:
        ctx.save_for_backward(weights, table)
        ctx.lists, ctx.backend, ctx.gradients = lists, backend, gradients
        return _sums(weights, table, lists, backend)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *given: Tensor) -> tuple[Tensor | None, ...]:
        weights, table = ctx.saved_tensors
        (gradient,) = given
        dweights = _dots(gradient, table, ctx.lists, ctx.backend) if ctx.needs_input_grad[0] else None
        dtable = _table_gradient(ctx, gradient, weights, table) if ctx.needs_input_grad[1] else None
        return dweights, dtable, None, None, None


_DOTS = "_embedding_bag_per_sample_weights_backward"
"""The derivative of a bag by its weights is what `row_dots` computes; torch has no public name for it."""


@cache
def _sampled_works() -> bool:
    """Whether ``sampled_addmm`` is there and takes rows that are listed twice; that it is new is not passed on."""
    table = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = _sampled(table[:1], table, torch.tensor([[1, 0, 1]]))
        except (RuntimeError, NotImplementedError, AttributeError):
            return False
    return found.tolist() == [[11.0, 5.0, 11.0]]


def _sampled(x: Tensor, table: Tensor, indices: Tensor) -> Tensor:
    """The products as entries of ``x @ table.T`` at a sparse pattern: about twice as fast from memory as `_DOTS`."""
    bags, listed = indices.shape
    starts = torch.arange(0, bags * listed + 1, listed)
    entries = torch.zeros(bags * listed, dtype=x.dtype)  # multiplied by 0, which NaN would survive
    pattern = torch.sparse_csr_tensor(
        starts, indices.flatten(), entries, (bags, table.shape[0]), check_invariants=False
    )
    return torch.sparse.sampled_addmm(pattern, x, table.t(), beta=0.0).values().view(bags, listed)


def _dots(x: Tensor, table: Tensor, lists: RowLists, backend: RowBackend) -> Tensor:
    indices = lists.indices
    if backend == "triton":
        from layerwright.nn import _expert_rows_triton

        return _expert_rows_triton.dots(x.contiguous(), table.contiguous(), indices)
    known = x.dtype in (torch.float32, torch.float64) and indices.shape[1] <= table.shape[0]
    if x.device.type == "cpu" and known and _sampled_works():
        return _sampled(x.contiguous(), table.contiguous(), indices)
    bags, listed = indices.shape
    bag_of = torch.arange(bags, device=x.device).repeat_interleave(listed)
    starts = torch.arange(0, bags * listed, listed, device=x.device)
    flat = getattr(torch.ops.aten, _DOTS)(x.contiguous(), table.contiguous(), indices.flatten(), starts, bag_of, 0, -1)
    return flat.view(bags, listed)  # type: ignore[no-any-return]


def _sums(weights: Tensor, table: Tensor, lists: RowLists, backend: RowBackend) -> Tensor:
    if backend == "triton":
        from layerwright.nn import _expert_rows_triton

        return _expert_rows_triton.sums(weights.contiguous(), table.contiguous(), lists.indices)
    return F.embedding_bag(lists.indices, table, per_sample_weights=weights.contiguous(), mode="sum")


def _table_gradient(ctx: Any, rows: Tensor, weights: Tensor, table: Tensor) -> Tensor:
    """The derivative by a table ``(rows, dim)``: for each row in use, the weighted sum over the bags that list it.

    Each row is summed by itself in a fixed order: no two writers meet, so the result is always the same.
    """
    used: RowsInUse = ctx.lists.used
    bags = used.places // ctx.lists.indices.shape[1]
    ordered = weights.flatten()[used.places]
    if ctx.backend == "triton":
        from layerwright.nn import _expert_rows_triton

        values = _expert_rows_triton.segment_sums(ordered, rows.contiguous(), bags, used.starts)
    else:
        values = F.embedding_bag(bags, rows.contiguous(), used.starts, per_sample_weights=ordered, mode="sum")
    if ctx.gradients == "dense":
        return torch.zeros_like(table).index_copy_(0, used.rows, values)
    return torch.sparse_coo_tensor(used.rows[None], values, table.shape, is_coalesced=True, check_invariants=False)
