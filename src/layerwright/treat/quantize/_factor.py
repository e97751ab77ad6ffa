"""The factorised second moments that GPTQ and SparseGPT share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from layerwright.core.errors import InputError

__all__ = ["Factor", "Order", "factor_notes", "prepare", "select_rows"]

Order = Literal["descending", "natural"]
"""Columns by falling second moment (the paper's act-order), or as they stand."""

_RETRIES = 3


@dataclass(frozen=True)
class Factor:
    """``H[order][:, order] = R R^T`` with `R` upper triangular, for `count` matrices of inputs.

    GPTQ spreads the error of a column with rows of the upper Cholesky factor `U` of ``H^-1``. Since ``U = R^-1``,
    the same weights follow from `R` itself, without inverting anything: when column `j` is reached, its value is
    ``w_j + sum_{i<j} (w_i - w^_i) R_ij / R_jj``, with `w` the original weights and `w^` the results so far.

    Attributes:
        order: ``(count, in)`` int64, the column that stands at each position.
        spread: ``(count, in, in)`` float32; row `j` holds ``R_ij / R_jj`` for ``i < j``.
        pivot: ``(count, in)`` float32, ``R_jj``, which is ``1 / U_jj``.
        dead: ``(count, in)`` bool in column order, inputs that were always zero.
        importance: ``(count, in)`` float32 in column order, the diagonal of `H`.
        unseen: ``(count,)`` bool, matrices that saw no input but zeros.
        damped: ``(count,)`` bool, matrices that took extra damping.
        failed: ``(count,)`` bool, matrices that no damping helped.
    """

    order: Tensor
    spread: Tensor
    pivot: Tensor
    dead: Tensor
    importance: Tensor
    unseen: Tensor
    damped: Tensor
    failed: Tensor

    @property
    def notes(self) -> list[str]:
        """What was out of the ordinary, in words."""
        return factor_notes(self.unseen, self.damped, self.failed)


def factor_notes(unseen: Tensor, damped: Tensor, failed: Tensor) -> list[str]:
    """Notes that start with a reason of `layerwright.core.records`; all arguments are ``(count,)`` bool."""
    notes = []
    if bool(unseen.all()):
        notes.append("never reached by the calibration data")
    elif bool(unseen.any()):
        notes.append(f"some experts saw no tokens: {_indices(unseen)}")
    if bool(damped.any()):
        notes.append(f"factorization damped{_which(damped)}")
    if bool(failed.any()):
        notes.append(f"factorization failed, rounded to nearest{_which(failed)}")
    return notes


@torch.no_grad()
def prepare(
    gram: Tensor, tokens: Tensor | int, *, order: Order | Tensor = "descending", damping: float = 0.01
) -> Factor:
    """Factorise ``H = 2 / tokens * gram + damping * mean(diag H) * I``, once for all weights that read this input.

    Dead inputs (a zero on the diagonal) do not take part in the mean. The factorisation runs in float32, again in
    float64 where that fails, then with ten times the damping, up to three times. Where nothing helps, and for
    matrices that saw no tokens, the factor spreads no error, so that every method falls back to its form without
    statistics; `Factor.notes` says so. Time ``in**3 / 3`` multiply-adds; memory three times `gram`.

    Args:
        gram: ``(count, in, in)`` or ``(in, in)``, symmetric.
        tokens: rows that were summed, a number or ``(count,)``.
        order: in which columns will be visited, by name or ``(count, in)`` int64.
        damping: share of the mean second moment that is added to every one.

    Raises:
        InputError: `gram` is not finite, or not square.
    """
    gram = gram.unsqueeze(0) if gram.dim() == 2 else gram
    count, size = gram.shape[0], gram.shape[-1]
    if gram.shape[-2] != size:
        raise InputError(f"gram: got shape {tuple(gram.shape)}, expected square matrices")
    diagonal = gram.diagonal(dim1=-2, dim2=-1).float()
    if not bool(diagonal.isfinite().all()):
        raise InputError("gram: its diagonal holds NaN or infinity; check the calibration data")
    seen = torch.as_tensor(tokens, device=gram.device).expand(count)
    unseen = (seen == 0) | (diagonal == 0).all(-1)
    factor_of = (2.0 / seen.clamp(min=1).double()).float()
    importance = diagonal * factor_of[:, None]
    dead = (importance == 0) & ~unseen[:, None]
    live = (~dead).sum(-1).clamp(min=1)
    mean = torch.where(unseen, 1.0, importance.sum(-1) / live)
    filled = torch.where(importance == 0, mean[:, None], importance)
    if isinstance(order, Tensor):
        columns = order.to(gram.device).expand(count, size)
    elif order == "descending":
        columns = importance.argsort(dim=-1, descending=True, stable=True)
        columns = torch.where(unseen[:, None], torch.arange(size, device=gram.device), columns)
    else:
        columns = torch.arange(size, device=gram.device).expand(count, size)

    # R is upper triangular in `order`, therefore lower triangular in the reversed order, where LAPACK finds it.
    backwards = columns.flip(-1)
    moments = select_rows(select_rows(gram, backwards).transpose(1, 2), backwards).float()
    moments *= factor_of[:, None, None]
    moments.diagonal(dim1=-2, dim2=-1).copy_(filled.gather(1, backwards))
    lower, damped, failed = _cholesky(moments, damping * mean)

    pivot = lower.diagonal(dim1=-2, dim2=-1)
    spread = (lower / pivot.unsqueeze(1)).flip(1, 2).transpose(1, 2).contiguous()
    return Factor(columns, spread, pivot.flip(-1).contiguous(), dead, importance, unseen, damped & ~failed, failed)


def select_rows(matrices: Tensor, rows: Tensor) -> Tensor:
    """``matrices[b, rows[b]]`` for ``matrices (count, n, m)`` and ``rows (count, k)``, by whole rows."""
    count, size, width = matrices.shape
    flat = rows + torch.arange(count, device=rows.device)[:, None] * size
    return matrices.reshape(count * size, width).index_select(0, flat.flatten()).view(count, -1, width)


def _cholesky(moments: Tensor, damping: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lower factors ``(count, n, n)``, which matrices took extra damping, and which have none (the identity)."""
    diagonal = moments.diagonal(dim1=-2, dim2=-1)
    plain = diagonal.clone()
    diagonal.add_(damping[:, None])
    lower, info = torch.linalg.cholesky_ex(moments)
    damped = torch.zeros(len(moments), dtype=torch.bool, device=moments.device)
    for attempt in range(_RETRIES + 1):
        bad = _failed(lower, info)
        if not bool(bad.any()):
            return lower, damped, bad
        damped = damped | (bad if attempt else False)
        again = moments[bad].double()
        again.diagonal(dim1=-2, dim2=-1).copy_((plain + 10.0**attempt * damping[:, None])[bad])
        again, info_again = torch.linalg.cholesky_ex(again)
        lower[bad], info[bad] = again.float(), info_again
    bad = _failed(lower, info)
    lower[bad] = torch.eye(moments.shape[-1], device=moments.device)
    return lower, damped, bad


def _failed(lower: Tensor, info: Tensor) -> Tensor:
    pivot = lower.diagonal(dim1=-2, dim2=-1)
    return (info != 0) | ~((pivot > 0) & pivot.isfinite()).all(-1)


def _indices(flags: Tensor) -> str:
    found = flags.nonzero().flatten().tolist()
    return ", ".join(map(str, found[:20])) + (f" and {len(found) - 20} more" if len(found) > 20 else "")


def _which(flags: Tensor) -> str:
    return f": experts {_indices(flags)}" if len(flags) > 1 else ""
