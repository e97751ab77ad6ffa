"""GPTQ for rows of mixed widths: whole groups of columns in turn, their ranges chosen by what they put out."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from layerwright.core.treatment import MixRows, Quantize
from layerwright.nn.quantizer import find_scale, quantize
from layerwright.nn.stored import Stored
from layerwright.treat.quantize._factor import Factor, prepare
from layerwright.treat.quantize._gptq import sweep
from layerwright.treat.quantize._rtn import round_to_nearest

__all__ = ["CLIP_RATIOS", "gptq_by_groups", "group_order", "mix_rows", "output_clip"]

CLIP_RATIOS = tuple(1 - 0.02 * i for i in range(11))
"""Shares of a group's range that are tried: 1.00 down to 0.80."""


def group_order(gram: Tensor, group_size: int) -> Tensor:
    """``(in,)`` int64: groups of columns by falling sum of second moments; the members of a group stay together."""
    diagonal = gram.diagonal().reshape(-1, group_size)
    groups = diagonal.sum(1).argsort(descending=True, stable=True)
    return (groups[:, None] * group_size + torch.arange(group_size, device=gram.device)).flatten()


def output_clip(weight: Tensor, gram: Tensor, bits: int, symmetric: bool, scale_dtype: torch.dtype) -> Tensor:
    """For each row of one group, the share of its range with the least ``mean_t (x_t . (w - Q(w)))**2``.

    Both ends shrink by the same share; ties take the wider range.

    Args:
        weight: ``(rows, group)`` float32.
        gram: ``(group, group)``, sum of ``x x^T`` of these very inputs.
        bits, symmetric, scale_dtype: of the grid.

    Returns:
        ``(rows,)``.
    """
    best = torch.ones(len(weight), device=weight.device)
    least = torch.full_like(best, torch.inf)
    for ratio in CLIP_RATIOS:
        scale, zero = find_scale(weight, bits, -1, symmetric, clip=ratio, scale_dtype=scale_dtype, full_range=symmetric)
        miss = weight - _values(quantize(weight, scale, zero, bits), scale, zero)
        error = ((miss @ gram) * miss).sum(1)
        better = error < least
        least = torch.where(better, error, least)
        best = torch.where(better, ratio, best)
    return best


def gptq_by_groups(
    weight: Tensor, gram: Tensor, factor: Factor, settings: Quantize, scale_dtype: torch.dtype, *, clip: bool
) -> Stored:
    """GPTQ (Frantar et al., 2023) over groups of columns in the order of `factor`.

    A group's range is found when its turn comes, for the weights as the earlier groups have left them, and with the
    inputs of that very group (`clip`; else the range is that of the weights).

    Args:
        weight: ``(rows, in)`` float32.
        gram: ``(in, in)`` in column order.
        factor: with the order of `group_order`.
        settings: bits, group size and symmetry.
    """
    rows, in_ = weight.shape
    size = in_ if settings.group_size == -1 else settings.group_size
    order = factor.order[0]
    original = weight.masked_fill(factor.dead, 0.0)[:, order].t().contiguous()  # (in, rows), as they are visited
    spread, pivot = factor.spread[0], factor.pivot[0]
    error = torch.zeros_like(original)
    codes = torch.empty(rows, in_, dtype=torch.int8, device=weight.device)
    scales = torch.empty(rows, in_ // size, dtype=scale_dtype, device=weight.device)
    zeros = None if settings.symmetric else torch.empty(rows, in_ // size, dtype=torch.int8, device=weight.device)
    for start in range(0, in_, size):
        block = slice(start, start + size)
        columns = order[block]
        # What earlier groups add to each column, and, since the columns of the group also pass on among themselves
        # how far they were moved, the weights that GPTQ would see when it comes to this group.
        local = spread[block, block]
        carried = spread[block, :start] @ error[:start]
        unit = torch.tril(local, -1) + torch.eye(size, device=weight.device)
        now = original[block] + torch.linalg.solve_triangular(unit, carried, upper=False, unitriangular=True)
        now = now.t().contiguous()
        inputs = gram[columns][:, columns].float()
        symmetric = settings.symmetric
        share: Tensor | float = 1.0
        if clip:
            share = output_clip(now, inputs, settings.bits, symmetric, scale_dtype)[:, None]
        scale, zero = find_scale(
            now, settings.bits, -1, symmetric, clip=share, scale_dtype=scale_dtype, full_range=symmetric
        )
        part = dataclasses.replace(
            factor, order=torch.arange(size, device=weight.device)[None], spread=local[None], pivot=pivot[None, block]
        )
        grid = scale[None], None if zero is None else zero[None], settings.bits
        found = sweep(now[None].contiguous(), part, grid, None).values[0]
        group = int(columns[0]) // size
        codes[:, columns] = found
        scales[:, group] = scale[:, 0]
        if zeros is not None and zero is not None:
            zeros[:, group] = zero[:, 0]
        error[block] = original[block] - _values(found, scale, zero).t()
    back = None if zeros is None else zeros[None]
    return Stored((1, rows, in_), codes=codes[None], scale=scales[None], zero=back, quantize=settings)


@torch.no_grad()
def mix_rows(
    weight: Tensor,
    treatment: MixRows,
    gram: Tensor | None,
    tokens: Tensor | int,
    scale_dtype: torch.dtype = torch.float32,
    *,
    factors: dict[int, Factor] | None = None,
) -> tuple[Stored, list[str]]:
    """Quantize the rows of `weight` ``(out, in)``, those of each width on their own (Zheng et al., 2024, MixLLM).

    The second moments of the input are common to all rows: they are factorised once. Clipped ranges are given up, for
    the rows of one width, where they make the error of these rows' outputs larger.

    Args:
        weight: any float dtype.
        treatment: the rows and how they are rounded.
        gram: ``(in, in)``, the sum of ``x x^T``; None rounds to nearest.
        tokens: rows that were summed.
        scale_dtype: dtype that scales are stored in.
        factors: by group size, of this very gram; what is missing is added.

    Returns:
        What is stored, and notes on fallbacks.
    """
    weight = weight.float()
    out, in_ = weight.shape
    widths = treatment.widths(out)
    index = {bits: torch.tensor(rows, device=weight.device) for bits, rows in widths.items()}
    notes: list[str] = []
    factor = None
    size = in_ if treatment.group_size == -1 else treatment.group_size
    if gram is not None and treatment.method == "gptq":
        factors = {} if factors is None else factors
        if size not in factors:
            factors[size] = prepare(gram, tokens, order=group_order(gram, size)[None])
        factor = factors[size]
        notes = factor.notes
    parts: list[Stored] = []
    for bits, rows in index.items():
        own, settings = weight[rows], treatment.part(bits)
        if factor is None or gram is None:
            parts.append(_nearest(own, settings, scale_dtype))
            continue
        plain = gptq_by_groups(own, gram, factor, settings, scale_dtype, clip=False)
        if treatment.clip:
            clipped = gptq_by_groups(own, gram, factor, settings, scale_dtype, clip=True)
            plain = clipped if _output_error(own, clipped, gram) <= _output_error(own, plain, gram) else plain
        parts.append(plain)
    order = torch.cat(list(index.values()))
    place = order.argsort().to(torch.int32)
    stored = Stored((1, out, in_), parts=tuple(parts), place=place, act_bits=treatment.act_bits)
    return stored, notes


def _nearest(weight: Tensor, settings: Quantize, scale_dtype: torch.dtype) -> Stored:
    """`round_to_nearest`, its symmetric scale the largest size over the largest code."""
    if not settings.symmetric:
        return round_to_nearest(weight[None], settings, scale_dtype)
    scale, _ = find_scale(weight, settings.bits, settings.group_size, scale_dtype=scale_dtype, full_range=True)
    codes = quantize(weight, scale, None, settings.bits)
    return Stored((1, *weight.shape), codes=codes[None], scale=scale[None], quantize=settings)


def _output_error(weight: Tensor, stored: Stored, gram: Tensor) -> float:
    miss = weight - stored.to_dense()[0]
    return float(((miss @ gram.float()) * miss).sum(dtype=torch.float64))


def _values(codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    shifted = codes.float() if zero is None else codes.float() - zero.float()
    return shifted * scale.float()
