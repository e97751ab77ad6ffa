"""Rounding to nearest, and the search for scales that all quantizing methods share."""

from __future__ import annotations

import torch
from torch import Tensor

from layerwright.core.treatment import Quantize
from layerwright.nn.quantizer import find_scale, mse_clip, quantize
from layerwright.nn.stored import Stored

__all__ = ["group_scales", "round_to_nearest"]


@torch.no_grad()
def group_scales(
    weight: Tensor,
    treatment: Quantize,
    scale_dtype: torch.dtype,
    *,
    clip: bool,
    importance: Tensor | None = None,
    steps: int = 90,
    step: float = 0.01,
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero ``(count, out, groups)`` of `weight` ``(count, out, in)``.

    With `clip` each group's range shrinks to the least squared error, in which every input counts as `importance`
    ``(count, in)`` says (all alike without it).
    """
    bits, size, symmetric = treatment.bits, treatment.group_size, treatment.symmetric
    share: float | Tensor = 1.0
    if clip:
        weights = None if importance is None else importance.unsqueeze(1)
        share = mse_clip(
            weight, bits, size, symmetric, scale_dtype=scale_dtype, importance=weights, steps=steps, step=step
        )
    return find_scale(weight, bits, size, symmetric, clip=share, scale_dtype=scale_dtype)


@torch.no_grad()
def round_to_nearest(weight: Tensor, treatment: Quantize, scale_dtype: torch.dtype, *, clip: bool = False) -> Stored:
    """Quantize `weight` ``(count, out, in)`` each value by itself; `clip` seeks the range of least squared error."""
    scale, zero = group_scales(weight, treatment, scale_dtype, clip=clip)
    codes = quantize(weight, scale, zero, treatment.bits)
    count, out, in_ = weight.shape
    return Stored((count, out, in_), codes=codes, scale=scale, zero=zero, quantize=treatment)
