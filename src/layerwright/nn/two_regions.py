"""The two-region grid: codes of small values on a fine grid, of large ones on a coarse grid, one bit to tell them apart."""

from __future__ import annotations

import torch
from torch import Tensor

from layerwright.core.errors import InputError
from layerwright.nn.packing import pack, unpack

__all__ = ["choose_region", "pack_regions", "region_codes", "region_values", "unpack_regions"]


def choose_region(x: Tensor, scale: Tensor, bits: int, ratio: int, *, signed: bool) -> tuple[Tensor, Tensor]:
    """``(whether the coarse grid, place on the grid)`` of each value, bool and float, in the shape of `x`.

    The fine grid has the step `scale` and places ``0 .. 2**(bits-1) - 1``, or ``-2**(bits-2) .. 2**(bits-2) - 1`` if
    `signed`; the coarse one has the step ``scale * 2**ratio`` and places ``0 .. 2**(bits-1) - 1``. A value takes the
    nearer of the two, the fine one if they tie: every value that the fine grid covers is on the fine grid. What lies
    outside of both, infinities included, takes the nearest end.
    """
    half = 1 << (bits - 1)
    low, high = (-(half // 2), half // 2 - 1) if signed else (0, half - 1)
    coarse = scale * 2.0**ratio
    x = torch.minimum(torch.maximum(x, low * scale), coarse * (half - 1))
    fine_place = (x / scale).round().clamp(low, high)
    coarse_place = (x / coarse).round().clamp(0, half - 1)
    far = (x - fine_place * scale).abs() > (x - coarse_place * coarse).abs()
    return far, torch.where(far, coarse_place, fine_place)


def region_codes(x: Tensor, scale: Tensor, bits: int, ratio: int, *, signed: bool) -> Tensor:
    """Signed `bits`-bit codes of `x`, int8: coarse places below zero (the top bit says which region), fine ones from 0.

    Every code of ``-2**(bits-1) .. 2**(bits-1) - 1`` stands for a value: one bit for the region, ``bits - 1`` for the
    place.

    Raises:
        InputError: bits outside 3 to 8.
    """
    low = _lowest(bits, signed)
    far, place = choose_region(x.float(), scale, bits, ratio, signed=signed)
    return torch.where(far, place - (1 << (bits - 1)), place - low).to(torch.int8)


def region_values(codes: Tensor, scale: Tensor, bits: int, ratio: int, *, signed: bool) -> Tensor:
    """Values of `region_codes`, float32."""
    low = _lowest(bits, signed)
    wide = codes.float()
    return torch.where(codes < 0, (wide + (1 << (bits - 1))) * (scale * 2.0**ratio), (wide + low) * scale)


def pack_regions(x: Tensor, scale: Tensor, bits: int, ratio: int, *, signed: bool) -> Tensor:
    """Codes of `x` ``(rows, columns)`` as a dense bit stream of `bits` bits each (`layerwright.nn.packing.pack`)."""
    return pack(region_codes(x, scale, bits, ratio, signed=signed), bits)


def unpack_regions(packed: Tensor, columns: int, scale: Tensor, bits: int, ratio: int, *, signed: bool) -> Tensor:
    """Values ``(rows, columns)`` float32 of what `pack_regions` gave."""
    return region_values(unpack(packed, bits, columns), scale, bits, ratio, signed=signed)


def _lowest(bits: int, signed: bool) -> int:
    if isinstance(bits, bool) or not isinstance(bits, int) or not 3 <= bits <= 8:
        raise InputError(f"bits: got {bits} for two regions, expected 3 to 8 (one bit says which region)")
    return -(1 << (bits - 2)) if signed else 0
