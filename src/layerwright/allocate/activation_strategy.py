"""How the activations of each layer are rounded, by two bounds on their range (Li et al., 2023, FPTQ)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Literal

from torch import Tensor

from layerwright.core.errors import InputError

__all__ = ["Strategy", "fptq_strategy"]

Strategy = Literal["static", "lae", "dynamic"]
"""One scale from the calibration; the same after logarithmic equalization; a scale for each token as it comes."""


def fptq_strategy(
    ranges: Mapping[str, Tensor | float],
    v0: float = 15.0,
    v1: float = 150.0,
    *,
    layers: Sequence[str] = (),
    equalizable: Collection[str] | None = None,
) -> dict[str, Strategy]:
    """`static` up to and with `v0`, `lae` between the bounds, `dynamic` from `v1` on.

    Args:
        ranges: layer to the largest size of its channels ``(in,)``, or of all of them.
        v0, v1: the paper's bounds for BLOOM and LLaMA.
        layers: all layers; one without a range was never reached, and becomes `dynamic` with a warning.
        equalizable: layers whose input comes from a norm or a gated product; others between the bounds become
            `dynamic`. None takes all for such.

    Raises:
        InputError: bounds out of order or negative, no layers, or ranges that are not finite; names the layer.
    """
    if not 0 <= v0 < v1:
        raise InputError(f"v0, v1: got {v0:g} and {v1:g}, expected two bounds of 0 and above, the smaller first")
    names = list(dict.fromkeys([*layers, *ranges]))
    if not names:
        raise InputError("ranges: no layers; measure them first")
    missing = [name for name in names if name not in ranges]
    if missing:
        warnings.warn(
            f"never reached by the calibration data, rounded for each token: {', '.join(missing[:10])}", stacklevel=2
        )
    chosen: dict[str, Strategy] = {}
    for name in names:
        value = ranges.get(name, math.inf)
        v = float(value.max()) if isinstance(value, Tensor) else float(value)
        if name in ranges and not (math.isfinite(v) and v >= 0):
            raise InputError(f"{name}: its range is {v}; check the calibration data")
        if v <= v0:
            chosen[name] = "static"
        else:
            chosen[name] = "lae" if v < v1 and (equalizable is None or name in equalizable) else "dynamic"
    return chosen
