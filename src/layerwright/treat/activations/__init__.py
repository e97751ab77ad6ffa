"""Quantized activations: choose ranges from samples, and put the quantizers into a model."""

from __future__ import annotations

from layerwright.treat.activations._rounding import norm_channels, round_activations_
from layerwright.treat.activations._samples import Samples
from layerwright.treat.activations.ranges import (
    fit_log,
    fit_power_of_two,
    fit_quantizer,
    fit_two_regions,
    fit_uniform,
    hessian_error,
    search_region_ratio,
)

__all__ = [
    "Samples",
    "fit_log",
    "fit_power_of_two",
    "fit_quantizer",
    "fit_two_regions",
    "fit_uniform",
    "hessian_error",
    "norm_channels",
    "round_activations_",
    "search_region_ratio",
]
