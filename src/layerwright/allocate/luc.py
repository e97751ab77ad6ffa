"""Layer-wise unified compression (Yu et al., 2024, EDGE-LLM): bits by a mean rule, sparsity by a linear rule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from layerwright.core.errors import InputError

__all__ = ["LayerCompression", "luc", "luc_bits", "luc_sparsity", "reachable_sparsity"]

WIDTHS = (*range(2, 9), 16)
"""Bits that a layer may have; 16 leaves it as it is."""


@dataclass(frozen=True)
class LayerCompression:
    """What one transformer layer gets: `bits` of weights, activations and cache, and the share of zero weights."""

    bits: int
    sparsity: float


def luc(
    prune: Mapping[str, float],
    quantize: Mapping[str, float],
    *,
    base_bits: int = 4,
    sparsity: float = 0.5,
    max_sparsity: float = 0.95,
) -> dict[str, LayerCompression]:
    """Bits and sparsity of every transformer layer from its sensitivities to either (see the two rules).

    Raises:
        InputError: different layers in the two, or what the rules refuse.
    """
    if prune.keys() != quantize.keys():
        odd = sorted(prune.keys() ^ quantize.keys())
        raise InputError(
            f"sensitivities: {', '.join(odd[:5])} stand in one of the two only; measure both for all layers"
        )
    bits = luc_bits(quantize, base_bits)
    shares = luc_sparsity(prune, sparsity, max_sparsity)
    return {path: LayerCompression(bits[path], shares[path]) for path in prune}


def luc_bits(sensitivity: Mapping[str, float], base: int = 4) -> dict[str, int]:
    """`base` bits where the sensitivity is at most the mean of all layers, twice as many where it is above.

    Raises:
        InputError: a base or its double that is no width from 2 to 8 or 16, or sensitivities that are no numbers.
    """
    for bits in (base, 2 * base if isinstance(base, int) else base):
        if isinstance(bits, bool) or bits not in WIDTHS:
            raise InputError(f"bits: got base {base!r}, expected 2, 3, 4 or 8 (it and its double are 2 to 8, or 16)")
    _check(sensitivity)
    mean = math.fsum(sensitivity.values()) / len(sensitivity)
    return {path: base if value <= mean else 2 * base for path, value in sensitivity.items()}


def luc_sparsity(sensitivity: Mapping[str, float], mean: float = 0.5, max_sparsity: float = 0.95) -> dict[str, float]:
    """Shares of zeros that fall linearly with sensitivity and are `mean` on average.

    ``u_l = 1 - (s_l - min s) / (max s - min s)`` and ``P_l = mean * L * u_l / sum u``: the most sensitive layer gets 0.
    A share above `max_sparsity` is cut to it, and what it gave up goes to the others in proportion to their ``u``.
    Layers that are all equally sensitive all get `mean`.

    Args:
        sensitivity: by layer, finite.
        mean: from 0 to below 1, unweighted over layers.
        max_sparsity: from 0 to below 1.

    Raises:
        InputError: numbers outside these ranges, or a mean that `max_sparsity` does not allow.
    """
    for name, value in (("sparsity", mean), ("max_sparsity", max_sparsity)):
        if not 0 <= value < 1:
            raise InputError(f"{name}: got {value}, expected a share from 0 to below 1")
    _check(sensitivity)
    reachable = reachable_sparsity(sensitivity, max_sparsity)
    if mean > reachable + 1e-12:
        raise InputError(
            f"sparsity: a mean of {mean:g} cannot be reached with max_sparsity {max_sparsity:g} "
            f"(the most sensitive layers stay whole); the largest mean is {reachable:g}"
        )
    weights = _weights(sensitivity)
    if not any(weights.values()):
        return dict.fromkeys(sensitivity, mean)
    left = mean * len(weights)
    shares = dict.fromkeys(weights, 0.0)
    free = {path: u for path, u in weights.items() if u > 0}
    while free:
        factor = left / math.fsum(free.values())
        above = [path for path, u in free.items() if factor * u > max_sparsity]
        if not above:
            return shares | {path: factor * u for path, u in free.items()}
        for path in above:
            shares[path] = max_sparsity
            del free[path]
        left = max(0.0, left - len(above) * max_sparsity)
    return shares


def reachable_sparsity(sensitivity: Mapping[str, float], max_sparsity: float = 0.95) -> float:
    """The largest mean that `luc_sparsity` can give: every layer but the most sensitive ones at `max_sparsity`."""
    weights = _weights(sensitivity)
    equal = not any(weights.values())
    return max_sparsity if equal else max_sparsity * sum(u > 0 for u in weights.values()) / len(weights)


def _weights(sensitivity: Mapping[str, float]) -> dict[str, float]:
    """``u`` of every layer; all 0 where the sensitivities are equal."""
    low, high = min(sensitivity.values()), max(sensitivity.values())
    width = high - low
    if width == 0:
        return dict.fromkeys(sensitivity, 0.0)
    return {path: (high - value) / width for path, value in sensitivity.items()}


def _check(sensitivity: Mapping[str, float]) -> None:
    if not sensitivity:
        raise InputError("sensitivities: got none, expected one for each layer")
    bad = [path for path, value in sensitivity.items() if not math.isfinite(value)]
    if bad:
        raise InputError(
            f"sensitivities: {bad[0]} is {sensitivity[bad[0]]}, expected a number; check the calibration data"
        )
