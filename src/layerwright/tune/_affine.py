"""The affine quantizer with learnable range and minimum, on unsigned codes ``0 .. 2**bits - 1``."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from layerwright.core.errors import InputError

__all__ = ["Ranges", "affine_codes", "affine_quantize", "check_bits", "mse_range", "nelder_mead_range"]

Ranges = Literal["mean", "minmax", "mse", "nelder_mead"]
"""How a range is measured: ends of the values (``mean``: averaged over samples), or those of least squared error."""

LEAST_RANGE, LARGEST_RANGE = 1e-6, 1e5


def check_bits(bits: int, name: str = "bits") -> int:
    """`bits` if it is a whole number from 2 to 16.

    Raises:
        InputError: it is not.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 16:
        raise InputError(f"{name}: got {bits!r}, expected a whole number from 2 to 16")
    return bits


def affine_codes(x: Tensor, span: Tensor, low: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of `x`, the scale and the zero point; `span` and `low` broadcast to `x`.

    ``s = clamp(span) / (2**bits - 1)``, ``z = clamp(round(-low / s))``, ``code = clamp(round(x / s) + z)``. Roundings
    pass the gradient straight through, clamps stop it (Bengio et al., 2013).
    """
    levels = (1 << bits) - 1
    scale = span.clamp(LEAST_RANGE, LARGEST_RANGE) / levels
    zero = _round(-low / scale).clamp(0, levels)
    return (_round(x / scale) + zero).clamp(0, levels), scale, zero


def affine_quantize(x: Tensor, span: Tensor, low: Tensor, bits: int) -> Tensor:
    """`x` on the grid of `affine_codes`: ``(code - z) s``, with gradients for `x`, `span` and `low`.

    Source: Hubara et al. (2020), arXiv 2006.10518.
    """
    codes, scale, zero = affine_codes(x, span, low, bits)
    return (codes - zero) * scale


@torch.no_grad()
def mse_range(rows: Tensor, bits: int, steps: int = 90, step: float = 0.01) -> tuple[Tensor, Tensor]:
    """Range and minimum ``(count,)`` of each row ``(count, n)``: both ends shrunk by the share of least squared error."""
    low, high = rows.amin(-1).clamp(max=0), rows.amax(-1).clamp(min=0)
    least = torch.full_like(low, torch.inf)
    best = torch.ones_like(low)
    for number in range(steps):
        share = 1 - step * number
        rounded = affine_quantize(rows, (high - low).unsqueeze(-1) * share, low.unsqueeze(-1) * share, bits)
        error = (rounded - rows).square_().sum(-1)
        best = torch.where(error < least, share, best)
        least = torch.minimum(error, least)
    return (high - low) * best, low * best


@torch.no_grad()
def nelder_mead_range(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Range and minimum (scalars) of least squared error over all `values`: Nelder and Mead (1965) from the best shares."""
    from scipy.optimize import minimize

    flat = values.reshape(1, -1)
    span, low = (float(part) for part in mse_range(flat, bits))
    unit = max(span, LEAST_RANGE)

    def error(point: Any) -> float:
        if point[0] <= 0 or point[1] > 0 or point[0] + point[1] < 0:
            return float("inf")
        rounded = affine_quantize(flat, flat.new_tensor(point[0] * unit), flat.new_tensor(point[1] * unit), bits)
        return float((rounded - flat).square().mean())

    options: Any = {"maxfev": 200}
    found = minimize(error, [span / unit, low / unit], method="Nelder-Mead", options=options)
    return values.new_tensor(found.x[0] * unit), values.new_tensor(found.x[1] * unit)


def _round(x: Tensor) -> Tensor:
    """Half to even, with the gradient of the identity."""
    return x + (x.round() - x).detach()
