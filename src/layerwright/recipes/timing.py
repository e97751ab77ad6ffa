"""Time of a layer after treatment: measured once per shape on this machine, as a ratio to the untreated layer."""

from __future__ import annotations

import dataclasses
import statistics
import time

import torch
from torch import nn

from layerwright.core.errors import InputError
from layerwright.core.layer import LayerRef
from layerwright.core.treatment import LowRank, Quantize, Sparsify, Treatments
from layerwright.nn.replace import replace_
from layerwright.recipes.table import MsOf
from layerwright.treat.compute import treated

__all__ = ["measured_times"]


def measured_times(rows: int, dtype: torch.dtype, repeats: int = 3) -> MsOf:
    """A function ``ms(layer, treatments, ms before)`` for the option table.

    For each distinct shape and treatment a linear layer of random weights is treated (by the methods that need no
    data; the stored form is the same) and timed on `rows` rows beside the plain one, in turn; the layer's own
    measured time is scaled by the ratio. Convolutions and experts keep their time, as their packed forms compute the
    same products.
    """
    ratios: dict[tuple[tuple[int, int], Treatments], float] = {}

    def ms(ref: LayerRef, treatments: Treatments, before: float) -> float:
        if ref.layout not in ("linear", "conv1d"):
            return before
        key = (ref.shape, tuple(_without_data(t) for t in treatments))
        if key not in ratios:
            ratios[key] = _ratio(ref.shape, key[1], rows, dtype, repeats)
        return before * ratios[key]

    return ms


def _without_data(t: object) -> Quantize | Sparsify | LowRank:
    if isinstance(t, Quantize):
        return dataclasses.replace(t, method="rtn", act_mode="dynamic")
    if isinstance(t, Sparsify):
        return dataclasses.replace(t, method="magnitude")
    if isinstance(t, LowRank):
        return dataclasses.replace(t, method="svd")
    raise InputError(f"{t} is not a treatment of a weight")


@torch.no_grad()
def _ratio(shape: tuple[int, int], treatments: Treatments, rows: int, dtype: torch.dtype, repeats: int) -> float:
    generator = torch.Generator().manual_seed(0)
    out, in_ = shape
    weight = torch.randn(1, out, in_, generator=generator)
    plain = nn.Linear(in_, out, bias=False).to(dtype)
    holder = nn.Sequential(nn.Linear(in_, out, bias=False).to(dtype))
    stored, _ = treated(weight, treatments, None, scale_dtype=dtype)
    replace_(holder, LayerRef("0", "linear", "0.weight", shape, layout="linear"), stored)
    x = torch.randn(rows, in_, generator=generator).to(dtype)
    found: tuple[list[float], list[float]] = ([], [])
    for number in range(repeats + 1):
        for times, layer in zip(found, (plain, holder), strict=True):
            begun = time.perf_counter()
            layer(x)
            if number:
                times.append(time.perf_counter() - begun)
    return statistics.median(found[1]) / max(statistics.median(found[0]), 1e-9)
