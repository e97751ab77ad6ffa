"""Mixing layers as Kronecker products: the wide, sparse matrices that they are on vectorised features."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from layerwright.core.errors import InputError
from layerwright.nn.pk_layer import ShallowMixer

__all__ = ["balanced_norm", "commutation_indices", "kron_channel", "kron_token", "to_dense_mlp"]

_LARGEST = 4096


def kron_token(weight: Tensor, channels: int) -> Tensor:
    """``I_C kron W``: mixing along tokens, ``vec(W X) = (I_C kron W) vec(X)``, for `W` ``(tokens behind, tokens)``.

    ``vec`` puts the columns of ``X`` ``(tokens, channels)`` one below the other.
    """
    return torch.kron(torch.eye(channels, dtype=weight.dtype, device=weight.device), weight)


def kron_channel(weight: Tensor, tokens: int) -> Tensor:
    """``V^T kron I_S``: mixing along channels, ``vec(X V) = (V^T kron I_S) vec(X)``, for `V` ``(channels, channels behind)``."""
    return torch.kron(weight.mT.contiguous(), torch.eye(tokens, dtype=weight.dtype, device=weight.device))


def commutation_indices(tokens: int, channels: int) -> Tensor:
    """Indices with ``vec(X)[indices] = vec(X^T)`` for ``X`` ``(tokens, channels)``.

    As a matrix ``J``: ``V^T kron I_S = J_{S,C'}^T (I_S kron V^T) J_{S,C}``.
    """
    return torch.arange(tokens * channels).reshape(channels, tokens).mT.flatten()


def to_dense_mlp(mixer: ShallowMixer | nn.Sequential) -> nn.Sequential:
    """The perceptron with explicit weights that a `ShallowMixer`, or a row of them, is.

    Raises:
        InputError: more than 4096 features, or other layers.
    """
    blocks = [mixer] if isinstance(mixer, ShallowMixer) else list(mixer)
    layers: list[nn.Module] = []
    for block in blocks:
        if not isinstance(block, ShallowMixer):
            raise InputError(f"mixer: got {type(block).__name__}, expected ShallowMixer layers")
        for part in (block.token, block.channel):
            wide = part.width_in
            if wide > _LARGEST:
                raise InputError(f"mixer: {wide} features make {wide**2:,} weights; the largest is {_LARGEST} features")
            dense = nn.Linear(
                wide, part.num_blocks * part.out_block, dtype=part.weight.dtype, device=part.weight.device
            )
            with torch.no_grad():
                dense.weight.copy_(part.dense_weight())
                dense.bias.copy_(part(torch.zeros(1, wide, dtype=part.weight.dtype, device=part.weight.device))[0])
            layers += [dense, nn.ReLU()]
    return nn.Sequential(*layers)


def balanced_norm(product: Tensor) -> Tensor:
    """``||B||_F``: the least ``(||V||^2 + ||W||^2) / 2`` over all ``V`` and ``W`` whose Kronecker product is `B`.

    Weight decay on the two small matrices so is a penalty on the norm itself of the wide one, not on its square, which
    favours few large weights.
    """
    return torch.linalg.norm(product)
