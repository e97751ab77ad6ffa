"""GPTQ (Frantar et al., 2023): round column by column, and let the columns to come make up for the error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypedDict

import torch
from torch import Tensor

from layerwright.core.treatment import Quantize
from layerwright.nn.quantizer import find_scale, mse_clip
from layerwright.nn.quantizer import grid as code_grid
from layerwright.nn.stored import Stored
from layerwright.treat.quantize._factor import Factor, Order, prepare, select_rows

__all__ = ["BLOCK", "CLIP_GRID", "Choice", "Grid", "Scales", "Swept", "gptq", "gptq_with", "sweep"]


class ClipGrid(TypedDict):
    """How finely ranges are searched."""

    steps: int
    step: float


BLOCK = 128
"""Columns whose error reaches the later ones in one matrix product."""

_INNER = 16
_ROWS = 4096

CLIP_GRID = ClipGrid(steps=18, step=0.05)
"""Ranges from 1.0 down to 0.15. A five times finer grid changes the error of GPTQ by less than one percent."""

_WIDENED: dict[str, tuple[float, ...]] = {"range": (0.0,), "clip": (0.25,), "best": (0.1, 0.4, 0.75)}
"""Shares of the clipped part of the range that are given back."""

Scales = Literal["range", "clip", "best"]
"""Scales from the range of each group, from a range that is clipped for the least error, or the best of several for
each row."""

Grid = tuple[Tensor, Tensor | None, int]
"""Scale and zero ``(count, out, groups)``, and bits."""

Choice = Callable[[Tensor, Tensor, int], Tensor]
"""``(values (count, columns, out), pivot (count, columns), first column) -> kept``, bool in the shape of the values."""


@dataclass(frozen=True)
class Swept:
    """What `sweep` found.

    Attributes:
        values: ``(count, out, in)``, int8 codes, or float32 without a grid.
        mask: bool ``(count, out, in)``, True where a weight is kept; None if nothing was pruned.
        loss: ``(count, out)`` float32, squared error of each row, ``(w - w^) H (w - w^)`` with the damped `H`.
    """

    values: Tensor
    mask: Tensor | None
    loss: Tensor


def gptq(
    weight: Tensor,
    gram: Tensor,
    tokens: Tensor | int,
    treatment: Quantize,
    scale_dtype: torch.dtype = torch.float32,
    *,
    order: Order = "descending",
    scales: Scales | None = None,
) -> tuple[Stored, list[str]]:
    """Quantize `weight` ``(count, out, in)`` to the least squared error of its outputs on the calibration data.

    Args:
        weight: float ``(count, out, in)``.
        gram: ``(count, in, in)`` or ``(in, in)``, the sum of ``x x^T``.
        tokens: number of tokens that were summed, or ``(count,)``.
        treatment: bits, group size and symmetry.
        scale_dtype: dtype that scales are rounded to.
        order: of the columns; groups stay contiguous and their scales are found before anything moves.
        scales: how they are found; None is `best` up to 3 bits and `clip` above.

    Returns:
        What is stored, and notes on fallbacks.

    Raises:
        InputError: sizes that do not fit, or statistics that are not finite.
    """
    factor = prepare(gram, tokens, order=order)
    return gptq_with(weight, factor, treatment, scale_dtype, scales=scales), factor.notes


@torch.no_grad()
def gptq_with(
    weight: Tensor,
    factor: Factor,
    treatment: Quantize,
    scale_dtype: torch.dtype = torch.float32,
    *,
    scales: Scales | None = None,
    mask: Tensor | None = None,
) -> Stored:
    """`gptq` with a factor at hand: weights that read the same input share it, and may be stacked along ``out``.

    Clipped ranges are those of the least squared error of plain rounding, each input counting by its second moment,
    and then widened by a share of what was cut off: weights also move to make up for each other, most at few bits.
    `best` goes through the columns once for each of three such shares and keeps, row by row, the least error.

    With a `mask` ``(count, out, in)`` only the weights that it keeps are stored, and make up for each other's error.
    """
    weight = weight.float().masked_fill(factor.dead.unsqueeze(1), 0.0)
    bits, size, symmetric = treatment.bits, treatment.group_size, treatment.symmetric
    choose: Choice | None = None
    if mask is not None:
        weight = weight * mask
        choose = _fixed(select_rows(mask.transpose(1, 2), factor.order))
    scales = scales or ("best" if bits <= 3 else "clip")
    cut: Tensor | float = 0.0
    if scales != "range":
        importance = torch.where(factor.unseen[:, None], 1.0, factor.importance).unsqueeze(1)
        cut = 1 - mse_clip(weight, bits, size, symmetric, scale_dtype=scale_dtype, importance=importance, **CLIP_GRID)
    # Where no error is spread, weights do not move.
    still = (factor.unseen | factor.failed)[:, None, None]
    best: tuple[Tensor, Tensor, Tensor | None, Tensor] | None = None
    for share in _WIDENED[scales]:
        clip = 1 - cut * (1 - torch.where(still, 0.0, share))
        scale, zero = find_scale(weight, bits, size, symmetric, clip=clip, scale_dtype=scale_dtype)
        swept = sweep(weight, factor, (scale, zero, bits), choose)
        found = swept.values, scale, zero, swept.loss
        best = found if best is None else _better(best, found)
    assert best is not None
    count, out, in_ = weight.shape
    return Stored((count, out, in_), codes=best[0], scale=best[1], zero=best[2], mask=mask, quantize=treatment)


def _better(
    a: tuple[Tensor, Tensor, Tensor | None, Tensor], b: tuple[Tensor, Tensor, Tensor | None, Tensor]
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Codes, scale, zero and loss of `b` in the rows where its loss is less, of `a` elsewhere."""
    rows = (b[3] < a[3]).unsqueeze(-1)
    zero = None if a[2] is None or b[2] is None else torch.where(rows, b[2], a[2])
    return torch.where(rows, b[0], a[0]), torch.where(rows, b[1], a[1]), zero, torch.minimum(a[3], b[3])


def _fixed(kept: Tensor) -> Choice:
    return lambda values, pivot, first: kept[:, first : first + values.shape[1]]


@torch.no_grad()
def sweep(
    weight: Tensor,
    factor: Factor,
    grid: Grid | None,
    choose: Choice | None,
    *,
    choose_every: int = BLOCK,
) -> Swept:
    """Go through the columns in the factor's order; round (`grid`), prune (`choose`) or both.

    Rows do not depend on each other and are taken `_ROWS` at a time when nothing is pruned, so that the working set
    stays in cache; memory is three float32 copies of these rows (of the weight, when pruning).

    Args:
        weight: ``(count, out, in)`` float32.
        factor: of the inputs' second moments.
        grid: the scales to round with; None does not round.
        choose: called with the values of the columns to come, which carry all earlier errors.
        choose_every: columns that it is called for, `BLOCK` or a number that divides 16.
    """
    out = weight.shape[1]
    step = out if choose is not None else _ROWS
    parts = []
    for start in range(0, out, step):
        rows = slice(start, start + step)
        part = None if grid is None else (grid[0][:, rows], None if grid[1] is None else grid[1][:, rows], grid[2])
        parts.append(_sweep_rows(weight[:, rows], factor, part, choose, choose_every))
    if len(parts) == 1:
        return parts[0]
    return Swept(torch.cat([part.values for part in parts], 1), None, torch.cat([part.loss for part in parts], 1))


def _sweep_rows(
    weight: Tensor,
    factor: Factor,
    grid: Grid | None,
    choose: Choice | None,
    choose_every: int,
) -> Swept:
    in_ = weight.shape[-1]
    # Columns are rows here: (count, in, out), in the order in which they are visited.
    original = select_rows(weight.transpose(1, 2), factor.order)
    error = torch.empty_like(original)
    result = torch.empty_like(original, dtype=torch.float32 if grid is None else torch.int8)
    kept = torch.empty_like(original, dtype=torch.bool) if choose is not None else None
    loss = torch.zeros_like(original[:, 0])
    step = min(choose_every, _INNER)
    for start in range(0, in_, BLOCK):
        stop = min(start + BLOCK, in_)
        block = slice(start, stop)
        values = torch.baddbmm(original[:, block], factor.spread[:, block, :start], error[:, :start])
        rounded = torch.empty_like(values)
        round_ = _rounding(grid, factor.order[:, block], in_)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            ahead = values[:, first - start :]
            ahead[:, : last - first].baddbmm_(factor.spread[:, first:last, start:first], error[:, start:first])
            if choose is not None and kept is not None and (first - start) % choose_every == 0:
                chosen = slice(first, min(first + choose_every, stop))
                # What these columns will be if none of them errs: each then also carries how far those before it moved.
                moved = ahead[:, :choose_every] - original[:, chosen]
                local = factor.spread[:, chosen, chosen]
                moved = torch.linalg.solve_triangular(local, moved, upper=False, unitriangular=True)
                kept[:, chosen] = choose(original[:, chosen] + moved, factor.pivot[:, chosen], first)
            for column in range(first, last):
                this, local_ = slice(column, column + 1), slice(column - start, column - start + 1)
                value = values[:, local_]
                if column > first:
                    value.baddbmm_(factor.spread[:, this, first:column], error[:, first:column])
                mask = None if kept is None else kept[:, this]
                round_(column - start, value, mask, rounded[:, local_], original[:, this], error[:, this])
        result[:, block] = rounded
        # Values before minus values after rounding, in the factor's units: their squares add up to the damped error.
        misses = values.sub_(original[:, block]).add_(error[:, block]).mul_(factor.pivot[:, block, None])
        loss += misses.square_().sum(1)
    back = factor.order.argsort(dim=-1)
    found = select_rows(result, back).transpose(1, 2).contiguous()
    return Swept(found, None if kept is None else select_rows(kept, back).transpose(1, 2).contiguous(), loss)


def _rounding(
    grid: Grid | None, order: Tensor, in_: int
) -> Callable[[int, Tensor, Tensor | None, Tensor, Tensor, Tensor], None]:
    """What is done to a column of the block at `order`; all tensors are ``(count, 1, out)``.

    Returns:
        A function of (position in the block, value, mask or None, result, original value, error), which writes its
        code or value to `result` and what it is off the original by to `error`.
    """
    if grid is None:

        def keep(
            column: int, value: Tensor, mask: Tensor | None, result: Tensor, original: Tensor, error: Tensor
        ) -> None:
            torch.mul(value, 1.0 if mask is None else mask, out=result)
            torch.sub(original, result, out=error)

        return keep
    scale, zero, bits = grid
    qmin, qmax = code_grid(bits)
    group = order // (in_ // scale.shape[-1])
    scales = select_rows(scale.transpose(1, 2).float(), group).unsqueeze(2).unbind(1)
    zeros = None if zero is None else select_rows(zero.transpose(1, 2).float(), group).unsqueeze(2).unbind(1)
    shifted = torch.empty_like(scales[0])

    def to_grid(
        column: int, value: Tensor, mask: Tensor | None, result: Tensor, original: Tensor, error: Tensor
    ) -> None:
        torch.div(value, scales[column], out=result)
        if mask is not None:
            result.mul_(mask)
        result.round_()
        if zeros is None:
            result.clamp_(qmin, qmax)
            torch.addcmul(original, result, scales[column], value=-1, out=error)
        else:
            result.add_(zeros[column]).clamp_(qmin, qmax)
            torch.sub(result, zeros[column], out=shifted)
            torch.addcmul(original, shifted, scales[column], value=-1, out=error)

    return to_grid
