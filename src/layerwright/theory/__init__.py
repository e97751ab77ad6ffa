"""Laws and limits: what follows before anything is trained.

- `scaling`: losses of a bigger run from a user's own small ones: laws, fits with intervals, compute-optimal choices.
- `expected_rank`: what rank random layers give, by width and activation (ReXNet).
- `kron_token`, `kron_channel`, `commutation_indices`, `to_dense_mlp`, `balanced_norm`: mixing layers as Kronecker products.
- `heads_sufficient`, `heads_necessary`, `head_dims`, `span_residual`: how many heads attention over patches needs to be a convolution.
"""

from __future__ import annotations

from layerwright.theory import scaling
from layerwright.theory.conv_attention import (
    head_dims,
    heads_necessary,
    heads_sufficient,
    quadratic_codes,
    span_residual,
)
from layerwright.theory.expected_rank import ExpectedRank, expected_rank
from layerwright.theory.kronecker import balanced_norm, commutation_indices, kron_channel, kron_token, to_dense_mlp

__all__ = [
    "ExpectedRank",
    "balanced_norm",
    "commutation_indices",
    "expected_rank",
    "head_dims",
    "heads_necessary",
    "heads_sufficient",
    "kron_channel",
    "kron_token",
    "quadratic_codes",
    "scaling",
    "span_residual",
    "to_dense_mlp",
]
