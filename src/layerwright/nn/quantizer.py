"""The affine quantizer: ``code = clamp(round(x / scale) + zero)``, ``x^ = (code - zero) * scale``.

Codes live on the signed grid ``[-2**(bits-1), 2**(bits-1) - 1]``. Rounding is half to even (``torch.round``), here and
everywhere. Scales are found in float32 and rounded to the dtype they will be stored in *before* any code is computed,
so that what is stored is what was optimised. Groups lie along the last dimension: ``group_size`` consecutive values
share a scale, -1 takes the whole dimension (a channel); for one scale per tensor, pass the tensor flattened.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from layerwright.core.errors import InputError

__all__ = [
    "dequantize",
    "fake_quantize",
    "find_scale",
    "grid",
    "lsq_gradient_scale",
    "mse_clip",
    "quantize",
    "quantize_tokens",
    "range_scale",
]

CHUNK_NUMEL = 1 << 17
"""Values that a clip search works on at a time: four float32 buffers of this size stay in a core's cache."""

_EPS = {torch.float16: 1e-5}


def grid(bits: int) -> tuple[int, int]:
    """Smallest and largest code of `bits` bits.

    Raises:
        InputError: `bits` is not a whole number from 2 to 8.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
        raise InputError(f"bits: got {bits!r}, expected a whole number from 2 to 8")
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def find_scale(
    weight: Tensor,
    bits: int,
    group_size: int = -1,
    symmetric: bool = True,
    *,
    clip: float | Tensor = 1.0,
    scale_dtype: torch.dtype = torch.float32,
    full_range: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of every group of `weight` ``(..., in)``.

    Symmetric: ``scale = max|x| / ((qmax - qmin) / 2)``, or ``max|x| / qmax`` with `full_range`. Asymmetric:
    ``scale = (max(x, 0) - min(x, 0)) / (qmax - qmin)`` and an integer zero point, so that 0 is always exact. A group
    whose values are all equal is represented exactly (as far as `scale_dtype` holds its value).

    Args:
        weight: any float dtype.
        bits: 2 to 8.
        group_size: values that share a scale, -1 for all of the last dimension.
        symmetric: no zero point.
        clip: share of the range that is kept, a number or a tensor ``(..., groups)``.
        scale_dtype: dtype that the scale is rounded to and returned in.
        full_range: see above; symmetric only.

    Returns:
        ``scale (..., groups)`` in `scale_dtype`, and ``zero (..., groups)`` int8, None if symmetric.

    Raises:
        InputError: bits outside 2..8, or a group size that does not divide the last dimension.
    """
    groups = _grouped(weight, group_size)
    low, high = groups.amin(-1).float(), groups.amax(-1).float()
    return range_scale(low, high, bits, symmetric, clip=clip, scale_dtype=scale_dtype, full_range=full_range)


def range_scale(
    low: Tensor,
    high: Tensor,
    bits: int,
    symmetric: bool = True,
    *,
    clip: float | Tensor = 1.0,
    scale_dtype: torch.dtype = torch.float32,
    full_range: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point, as `find_scale` gives them, for values in ``[low, high]`` (of any equal shapes)."""
    qmin, qmax = grid(bits)
    low, high = low.float(), high.float()
    zero = None
    if symmetric:
        scale = torch.maximum(low.abs(), high.abs()) * clip / (qmax if full_range else (qmax - qmin) / 2)
    else:
        scale = (high.clamp(min=0) - low.clamp(max=0)) * clip / (qmax - qmin)
    constant = low == high
    scale = torch.where(constant, low.abs(), scale)
    info = torch.finfo(scale_dtype)
    floor = _EPS.get(scale_dtype, torch.finfo(torch.float32).eps)
    scale = scale.clamp(max=info.max).to(scale_dtype)
    # A constant is kept even below the floor: its scale is its value. Zeros, and what underflows, take the floor.
    scale = torch.where(constant & (scale > 0), scale, scale.clamp(min=floor))
    if not symmetric:
        lowest = low.clamp(max=0) * clip / scale.float()
        zero = torch.where(constant, 0, (qmin - lowest).round().clamp(qmin, qmax)).to(torch.int8)
    return scale, zero


def quantize(x: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """Codes, int8 in the shape of `x` ``(..., in)``; `scale` and `zero` are ``(..., groups)``."""
    return _codes(_spread(x, scale), scale, zero, bits).to(torch.int8).reshape(x.shape)


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values of `codes` ``(..., in)`` in `dtype`, computed in float32 at least."""
    compute = torch.promote_types(scale.dtype, torch.float32)
    return _values(_spread(codes, scale).to(compute), scale, zero).reshape(codes.shape).to(dtype)


def fake_quantize(x: Tensor, scale: Tensor, zero: Tensor | None, bits: int, *, scale_gradient: float = 1.0) -> Tensor:
    """``dequantize(quantize(x))`` with gradients, in the shape and dtype of `x` ``(..., in)``.

    The gradient of `x` passes straight through the rounding and is zero where a value was clamped (Bengio et al.,
    2013). The gradient of `scale` ``(..., groups)`` is ``code - zero - x / scale`` inside the grid and ``code - zero``
    where clamped (LSQ, Esser et al., 2020), times `scale_gradient`.
    """
    result: Tensor = _FakeQuantize.apply(x, scale, zero, bits, scale_gradient)  # type: ignore[no-untyped-call]
    return result


def lsq_gradient_scale(numel: int, bits: int) -> float:
    """LSQ's factor ``1 / sqrt(numel * qmax)`` for the gradient of a scale that `numel` values share (Esser, 2020)."""
    return float((numel * grid(bits)[1]) ** -0.5)


def quantize_tokens(x: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Symmetric codes ``(..., in)`` int8 and scale ``(..., 1)`` float32, one scale per token as it comes."""
    scale, _ = find_scale(x, bits)
    return quantize(x, scale, None, bits), scale


@torch.no_grad()
def mse_clip(
    weight: Tensor,
    bits: int,
    group_size: int = -1,
    symmetric: bool = True,
    *,
    scale_dtype: torch.dtype = torch.float32,
    full_range: bool = False,
    importance: Tensor | None = None,
    steps: int = 90,
    step: float = 0.01,
) -> Tensor:
    """Share of each group's range, ``1 - step * i`` for ``i < steps``, with the least squared error.

    Both ends shrink by the same share (the grid that FQ-ViT and Evol-Q call OMSE). Ties take the wider range. Works
    on `CHUNK_NUMEL` values at a time, so that memory beyond the result stays at a few MiB.

    Args:
        weight: ``(..., in)``.
        bits: 2 to 8.
        group_size: as for `find_scale`.
        symmetric: no zero point.
        scale_dtype: dtype that scales will be rounded to.
        full_range: as for `find_scale`.
        importance: non-negative weights of the squared errors, broadcastable to `weight`; None weighs all alike.
        steps: number of shares that are tried.
        step: their distance.

    Returns:
        ``(..., groups)`` float32, to be passed as `clip` to `find_scale`.
    """
    groups = _grouped(weight, group_size)
    flat = groups.reshape(-1, *groups.shape[-2:])
    weights = where = None
    if importance is not None:
        weights = _grouped(importance, group_size).float().reshape(-1, *flat.shape[1:])
        where = (
            torch.arange(len(weights), device=weight.device)
            .reshape(importance.shape[:-1])
            .expand(weight.shape[:-1])
            .flatten()
        )
    best = torch.empty(flat.shape[:2], dtype=torch.float32, device=weight.device)
    rows = max(CHUNK_NUMEL // max(weight.shape[-1], 1), 1)
    for start in range(0, flat.shape[0], rows):
        part = slice(start, start + rows)
        mine = weights
        if weights is not None and where is not None and len(weights) > 1:
            mine = weights[where[part]]
        settings = (bits, symmetric, scale_dtype, full_range)
        best[part] = _best_clip(flat[part].float(), mine, settings, [1 - step * i for i in range(steps)])
    return best.reshape(groups.shape[:-1])


def _best_clip(
    x: Tensor, importance: Tensor | None, settings: tuple[int, bool, torch.dtype, bool], shares: list[float]
) -> Tensor:
    """The share of least error for each group of `x` ``(rows, groups, group)``."""
    bits, symmetric, scale_dtype, full_range = settings
    qmin, qmax = grid(bits)
    low, high = x.amin(-1), x.amax(-1)
    least = torch.full_like(low, torch.inf)
    best = torch.ones_like(low)
    scaled, rounded = torch.empty_like(x), torch.empty_like(x)
    for share in shares:
        scale, zero = range_scale(
            low, high, bits, symmetric, clip=share, scale_dtype=scale_dtype, full_range=full_range
        )
        scale = scale.float().unsqueeze(-1)
        torch.mul(x, scale.reciprocal(), out=scaled)
        # The zero point is whole, so that it may bound the rounded value instead of shifting it.
        torch.round(scaled, out=rounded)
        if zero is None:
            rounded.clamp_(qmin, qmax)
        else:
            shift = zero.float().unsqueeze(-1)
            torch.clamp(rounded, qmin - shift, qmax - shift, out=rounded)
        scaled.sub_(rounded)
        torch.mul(scaled, scaled, out=rounded)
        if importance is not None:
            rounded.mul_(importance)
        error = rounded.sum(-1) * scale.squeeze(-1).square()
        better = error < least
        least = torch.where(better, error, least)
        best.masked_fill_(better, share)
    return best


def _grouped(x: Tensor, group_size: int) -> Tensor:
    size = x.shape[-1] if group_size == -1 else group_size
    if size < 1 or x.shape[-1] % size:
        raise InputError(
            f"group_size: {group_size} does not divide the {x.shape[-1]} inputs; use a divisor, or -1 per channel"
        )
    return x.reshape(*x.shape[:-1], x.shape[-1] // size, size)


def _spread(x: Tensor, scale: Tensor) -> Tensor:
    """`x` ``(..., in)`` as ``(..., groups, group)`` to match `scale` ``(..., groups)``."""
    groups = scale.shape[-1] if scale.dim() else 1
    if x.shape[-1] % groups:
        raise InputError(f"scale: {groups} groups do not divide the {x.shape[-1]} inputs")
    return x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)


def _codes(x: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """Codes as floats; `x` is ``(..., groups, group)``."""
    qmin, qmax = grid(bits)
    compute = torch.promote_types(x.dtype, torch.float32)
    codes = (x.to(compute) / scale.to(compute).unsqueeze(-1)).round_()
    if zero is not None:
        codes += zero.unsqueeze(-1)
    return codes.clamp_(qmin, qmax)


def _values(codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    shifted = codes if zero is None else codes - zero.unsqueeze(-1).to(codes.dtype)
    return shifted * scale.to(codes.dtype).unsqueeze(-1)


class _FakeQuantize(torch.autograd.Function):
    """Keeps `x` and the scale only; the codes are found again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor | None, bits: int, scale_gradient: float) -> Tensor:
        ctx.save_for_backward(x, scale, zero)
        ctx.bits, ctx.scale_gradient = bits, scale_gradient
        spread = _spread(x, scale)
        return _values(_codes(spread, scale, zero, bits), scale, zero).reshape(x.shape).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, scale, zero = ctx.saved_tensors
        qmin, qmax = grid(ctx.bits)
        spread = _spread(x, scale)
        compute = torch.promote_types(x.dtype, torch.float32)
        gradient = _spread(gradients[0], scale).to(compute)
        ratio = spread.to(compute) / scale.to(compute).unsqueeze(-1)
        shift = 0 if zero is None else zero.unsqueeze(-1).to(compute)
        code = ratio.round() + shift
        inside = (code >= qmin) & (code <= qmax)
        x_gradient = scale_gradient = None
        if ctx.needs_input_grad[0]:
            x_gradient = (gradient * inside).reshape(x.shape).to(x.dtype)
        if ctx.needs_input_grad[1]:
            slope = code.clamp(qmin, qmax) - shift - ratio * inside
            scale_gradient = ((gradient * slope).sum(-1) * ctx.scale_gradient).sum_to_size(scale.shape).to(scale.dtype)
        return x_gradient, scale_gradient, None, None, None
