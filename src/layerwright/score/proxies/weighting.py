"""How bits enter the score of a layer that gets them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from layerwright.core.errors import InputError, unknown_name
from layerwright.nn.quantizer import dequantize, find_scale, mse_clip, quantize
from layerwright.score.proxies.statistics import LayerStatistics

__all__ = ["WEIGHTINGS", "Weighting", "bit_weights", "rounding_errors"]

Weighting = Literal["bits", "rounding"]
WEIGHTINGS: tuple[Weighting, ...] = ("bits", "rounding")
"""A layer's value times its bits, as EMQ was released; or times minus the squared rounding error that they leave, as in
HAWQ-V2 (Dong et al., 2020)."""


def bit_weights(
    statistics: LayerStatistics, widths: Sequence[int], weighting: Weighting = "bits"
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """``(layers, widths)`` by which the value of a layer is multiplied at each width; it rises with the width.

    Raises:
        InputError: an unknown weighting.
    """
    if weighting not in WEIGHTINGS:
        raise unknown_name("weighting", str(weighting), WEIGHTINGS, "a proxy")
    if weighting == "rounding":
        return -rounding_errors(statistics, widths)
    return np.tile(np.asarray(widths, dtype=np.float64), (len(statistics), 1))


def rounding_errors(statistics: LayerStatistics, widths: Sequence[int]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """``(layers, widths)`` of ``|Q_b(W) - W|^2``, one scale per output channel with the range of least squared error.

    Raises:
        InputError: statistics without the whole weights.
    """
    if len(statistics.weights) != len(statistics):
        raise InputError("rounding errors need the whole weights, which these statistics lack; use layer_statistics")
    errors = np.empty((len(statistics), len(widths)))
    for layer, weight in enumerate(statistics.weights):
        w = weight.float()
        for column, bits in enumerate(widths):
            scale, zero = find_scale(w, bits, clip=mse_clip(w, bits))
            rounded = dequantize(quantize(w, scale, zero, bits), scale, zero)
            errors[layer, column] = float((rounded - w).double().square().sum())
    return errors
