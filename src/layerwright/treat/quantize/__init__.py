"""Quantization of weights: rounding to nearest, clipped rounding, and GPTQ."""

from __future__ import annotations

from layerwright.treat.quantize._factor import Factor, Order, factor_notes, prepare
from layerwright.treat.quantize._gptq import Scales, gptq, gptq_with
from layerwright.treat.quantize._mixed_rows import group_order, mix_rows, output_clip
from layerwright.treat.quantize._rtn import group_scales, round_to_nearest

__all__ = [
    "Factor",
    "Order",
    "Scales",
    "factor_notes",
    "gptq",
    "gptq_with",
    "group_order",
    "group_scales",
    "mix_rows",
    "output_clip",
    "prepare",
    "round_to_nearest",
]
