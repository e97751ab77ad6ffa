"""Low-rank factors of weights, with or without regard to the inputs, and convolutions as chains of smaller ones."""

from __future__ import annotations

from layerwright.treat.factorize._conv import composed_kernel, conv_kernels, factor_cost, factorize_conv
from layerwright.treat.factorize._conv_cp import cp_factors
from layerwright.treat.factorize._embedding import factorize_embedding
from layerwright.treat.factorize._svd import low_rank, output_spectrum, svd_factors
from layerwright.treat.factorize._unit import ConvChain, chosen_factor, factor_conv_, place_chain_

__all__ = [
    "ConvChain",
    "chosen_factor",
    "composed_kernel",
    "conv_kernels",
    "cp_factors",
    "factor_conv_",
    "factor_cost",
    "factorize_conv",
    "factorize_embedding",
    "low_rank",
    "output_spectrum",
    "place_chain_",
    "svd_factors",
]
