"""Treatments: what can be done to a layer, as frozen data that travels through YAML."""

from __future__ import annotations

from layerwright.core.treatment._activations import RoundActivations, RoundAttention, RoundCache
from layerwright.core.treatment._base import TREATMENTS, Treatment, Treatments
from layerwright.core.treatment._blocks import Drop
from layerwright.core.treatment._cache import KVBudget
from layerwright.core.treatment._factors import FactorConv, LowRank
from layerwright.core.treatment._mix_rows import MixRows
from layerwright.core.treatment._reading import describe, treatments_from_data, treatments_to_data, weight_treatments
from layerwright.core.treatment._weights import Quantize, Sparsify
from layerwright.core.treatment._width import Narrow

__all__ = [
    "TREATMENTS",
    "Drop",
    "FactorConv",
    "KVBudget",
    "LowRank",
    "MixRows",
    "Narrow",
    "Quantize",
    "RoundActivations",
    "RoundAttention",
    "RoundCache",
    "Sparsify",
    "Treatment",
    "Treatments",
    "describe",
    "treatments_from_data",
    "treatments_to_data",
    "weight_treatments",
]
