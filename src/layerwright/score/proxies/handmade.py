"""The published hand-made proxies of bit vectors: what each layer adds to the score at each width."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from layerwright.core.errors import InputError
from layerwright.core.registry import Registry
from layerwright.nn.quantizer import find_scale, quantize
from layerwright.score.proxies.statistics import LayerStatistics
from layerwright.score.proxies.weighting import rounding_errors

__all__ = ["BIT_PROXIES", "BitProxy", "Gains"]

Gains = np.ndarray[Any, np.dtype[np.float64]]
"""``(layers, widths)``: what each layer adds to the score at each width; a higher sum promises a better network."""


@dataclass(frozen=True)
class BitProxy:
    """A proxy of bit vectors.

    Attributes:
        name: in the registry.
        needs: statistics it reads; see `layer_statistics`.
        gains: ``gains(statistics, widths) -> (layers, widths)``.
    """

    name: str
    needs: tuple[str, ...]
    gains: Callable[[LayerStatistics, Sequence[int]], Gains]


BIT_PROXIES: Registry[BitProxy] = Registry("bit proxy")
"""Hand-made proxies by name."""


def _add(name: str, *needs: str) -> Callable[[Callable[[LayerStatistics, Sequence[int]], Gains]], None]:
    return lambda function: BIT_PROXIES.add(name, BitProxy(name, needs, function))


def _weighted(values: Sequence[float], widths: Sequence[int]) -> Gains:
    """Bit weighting: ``b_l z_l``."""
    return np.outer(np.asarray(values, dtype=np.float64), np.asarray(widths, dtype=np.float64))


def _means(matrices: Sequence[torch.Tensor]) -> list[float]:
    return [float(matrix.double().mean()) for matrix in matrices]


@_add("snip", "G", "W")
def _snip(statistics: LayerStatistics, widths: Sequence[int]) -> Gains:
    """``b mean |G W|``: bit-SNIP, after Lee et al. (2019)."""
    return _weighted(_means([gw.abs() for gw in statistics.tensors("GW")]), widths)


@_add("synflow", "V", "W")
def _synflow(statistics: LayerStatistics, widths: Sequence[int]) -> Gains:
    """``b mean |V W|``: bit-SynFlow, after Tanaka et al. (2020)."""
    pairs = zip(statistics.tensors("V"), statistics.tensors("W"), strict=True)
    return _weighted(_means([(v * w).abs() for v, w in pairs]), widths)


@_add("fisher", "F")
def _fisher(statistics: LayerStatistics, widths: Sequence[int]) -> Gains:
    """``b`` times the Fisher information of the channels, ``1/2 E[(a da)^2]`` (Theis et al., 2018)."""
    return _weighted(_means(statistics.tensors("F")), widths)


@_add("hawq", "E")
def _hawq(statistics: LayerStatistics, widths: Sequence[int]) -> Gains:
    """``b`` times the top eigenvalue over the layer's weights (HAWQ, Dong et al., 2019)."""
    values = [float(e) / n for e, n in zip(statistics.tensors("E"), statistics.numel, strict=True)]
    return _weighted(values, widths)


@_add("hawq2", "H")
def _hawq2(statistics: LayerStatistics, widths: Sequence[int]) -> Gains:
    """``-tr(H) / n |Q_b(W) - W|^2`` (HAWQ-V2, Dong et al., 2020)."""
    traces = np.array(_means(statistics.tensors("H")))
    return -traces[:, None] * rounding_errors(statistics, widths)


@_add("qe", "A")
def _qe(statistics: LayerStatistics, widths: Sequence[int]) -> Gains:
    """Entropy of a Gaussian layer, ``log(in var(A) var(codes))``, with codes on a grid of step 1 (Sun et al., 2022)."""
    gains = np.empty((len(statistics), len(widths)))
    for layer, (weight, a) in enumerate(zip(statistics.weights, statistics.tensors("A"), strict=True)):
        activation = math.log(max(weight.shape[-1] * float(a.double().var(correction=0)), 1e-30))
        for column, bits in enumerate(widths):
            scale, zero = find_scale(weight.float(), bits)
            codes = quantize(weight.float(), scale, zero, bits).double()
            gains[layer, column] = activation + math.log(max(float(codes.var(correction=0)), 1e-30))
    return gains


@_add("ompq", "A")
def _ompq(statistics: LayerStatistics, widths: Sequence[int]) -> Gains:
    """Orthogonality of layers: ``theta = exp(-sum_k ORM)``, averaged over the layers from here on (Ma et al., 2021)."""
    rows = {len(a) for a in statistics.tensors("A")}
    if len(rows) > 1:
        raise InputError("ompq: layers see different numbers of samples; choose a proxy that does not compare outputs")
    grams = []
    for a in statistics.tensors("A"):
        gram = a.double() @ a.double().T
        grams.append((gram / gram.norm().clamp(min=1e-30)).flatten())
    # |f_j^T f_i|^2 is the inner product of the Gram matrices over samples.
    alike = torch.stack(grams) @ torch.stack(grams).T
    theta = (-(alike.sum(1) - 1)).exp().numpy()
    ahead = np.cumsum(theta[::-1])[::-1] / np.arange(len(theta), 0, -1)
    return _weighted(list(ahead), widths)


@_add("size")
def _size(statistics: LayerStatistics, widths: Sequence[int]) -> Gains:
    """Bits of all weights."""
    return _weighted(statistics.numel, widths)


@_add("bops", "A")
def _bops(statistics: LayerStatistics, widths: Sequence[int], act_bits: int = 8) -> Gains:
    """Bit operations of a sample: ``positions n b_w b_a``."""
    macs = [p * n * act_bits for p, n in zip(statistics.positions, statistics.numel, strict=True)]
    return _weighted(macs, widths)
