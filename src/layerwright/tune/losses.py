"""How far a model's outputs are from the original's, one number per batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from layerwright.core.errors import InputError, unknown_name

__all__ = [
    "OUTPUT_LOSSES",
    "OutputLoss",
    "cosine_outputs",
    "info_nce_outputs",
    "kl_outputs",
    "mse_outputs",
    "output_loss",
]

OutputLoss = Callable[[Tensor, Tensor], Tensor]
"""``loss(outputs, original outputs)`` of two ``(samples, classes)``: a scalar, lower is better."""


def info_nce_outputs(q: Tensor, k: Tensor, temperature: float = 3.0) -> Tensor:
    """Contrastive loss ``2T * CE(q k^T / T, diagonal)`` of rows brought to length 1, in float32.

    A sample's own original output is the positive, the originals of the other samples in the batch are the negatives
    (Oord et al., 2018; the factor as in Chen et al., 2021; on outputs: Frumkin et al., 2023, Evol-Q).

    Args:
        q: outputs ``(samples, classes)``; at least two samples.
        k: original outputs of the same samples.
        temperature: above 0.

    Raises:
        InputError: one sample, a temperature of 0 or less, shapes that differ.
    """
    _check(q, k)
    if not temperature > 0:
        raise InputError(f"temperature: got {temperature}, expected a number above 0")
    if len(q) < 2:
        raise InputError(
            f"batch_size: got {len(q)} sample, InfoNCE needs at least 2 in a batch (the others are negatives)"
        )
    similarity = F.normalize(q.float(), dim=-1) @ F.normalize(k.float(), dim=-1).T / temperature
    return 2 * temperature * F.cross_entropy(similarity, torch.arange(len(q), device=q.device))


def mse_outputs(q: Tensor, k: Tensor) -> Tensor:
    """Mean squared difference of the outputs, in float32."""
    _check(q, k)
    return (q.float() - k.float()).square().mean()


def kl_outputs(q: Tensor, k: Tensor) -> Tensor:
    """Mean Kullback-Leibler divergence of ``softmax(q)`` from ``softmax(k)``, in nats."""
    _check(q, k)
    logs = k.float().log_softmax(-1)
    return (logs.exp() * (logs - q.float().log_softmax(-1))).sum(-1).mean()


def cosine_outputs(q: Tensor, k: Tensor) -> Tensor:
    """One minus the mean cosine of the outputs of a sample."""
    _check(q, k)
    return 1 - F.cosine_similarity(q.float(), k.float(), dim=-1).mean()


OUTPUT_LOSSES: Mapping[str, OutputLoss] = {
    "cosine": cosine_outputs,
    "infonce": info_nce_outputs,
    "kl": kl_outputs,
    "mse": mse_outputs,
}
"""Losses by name."""


def output_loss(name: Literal["infonce", "mse", "kl", "cosine"] | str, temperature: float = 3.0) -> OutputLoss:
    """The loss called `name`; `temperature` is InfoNCE's.

    Raises:
        InputError: an unknown name, or a temperature of 0 or less.
    """
    if name not in OUTPUT_LOSSES:
        raise unknown_name("loss", name, OUTPUT_LOSSES)
    if not temperature > 0:
        raise InputError(f"temperature: got {temperature}, expected a number above 0")
    return partial(info_nce_outputs, temperature=temperature) if name == "infonce" else OUTPUT_LOSSES[name]


def _check(q: Tensor, k: Tensor) -> None:
    if q.shape != k.shape or q.dim() != 2:
        raise InputError(f"outputs: got {tuple(q.shape)} and {tuple(k.shape)}, expected two (samples, classes)")
