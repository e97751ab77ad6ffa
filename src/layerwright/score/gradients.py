"""Second moments of the gradients at the layers' outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from layerwright.core.calibration import Calibration, evaluating
from layerwright.core.capture import eager_experts
from layerwright.core.layer import LayerRef, get_parameter, to_matrices

__all__ = ["OutputGradients", "loss_terms", "output_gradients", "weight_gradients"]

FULL_BELOW = 2048
"""Layers with at most this many outputs keep the whole second-moment matrix, wider ones its diagonal."""


@dataclass(frozen=True)
class OutputGradients:
    """Gradients of the summed loss at a layer's output, over all tokens.

    Attributes:
        moment: ``(out, out)`` mean of ``g g^T``, or its diagonal ``(out,)``.
        tokens: rows that were seen.
        terms: loss terms (labelled tokens or samples) they belong to.
    """

    moment: Tensor
    tokens: int
    terms: int


def loss_terms(batch: Any) -> int:
    """Number of terms that the mean loss of `batch` averages: labels that count, else samples."""
    labels = (
        batch.get("labels") if isinstance(batch, Mapping) else batch[1] if isinstance(batch, tuple | list) else None
    )
    if isinstance(labels, Tensor):
        return max(int((labels[:, 1:] != -100).sum()) if labels.dim() == 2 else labels.numel(), 1)
    tensors = batch.values() if isinstance(batch, Mapping) else [batch]
    return next((int(t.shape[0]) for t in tensors if isinstance(t, Tensor) and t.dim()), 1)


def output_gradients(
    model: nn.Module, calibration: Calibration, refs: Sequence[LayerRef], progress: Any = None
) -> dict[str, OutputGradients]:
    """Gradient moments of every layer of `refs` that has a module, from one backward pass per batch.

    Parameters receive no gradients. Memory: one batch's backward pass and the moments.
    """
    layers = [ref for ref in refs if ref.layout in ("linear", "conv1d", "conv")]
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    terms = 0
    current = 1

    def hook(ref: LayerRef) -> Any:
        def forward(_module: nn.Module, _args: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(lambda gradient: add(ref, gradient))

        return forward

    def add(ref: LayerRef, gradient: Tensor) -> None:
        rows = gradient.detach().float()
        rows = rows.flatten(2).transpose(1, 2) if ref.layout == "conv" else rows
        rows = rows.reshape(-1, ref.shape[0]) * current
        moment = rows.T @ rows if ref.shape[0] <= FULL_BELOW else rows.square().sum(0)
        sums[ref.path] = sums[ref.path] + moment if ref.path in sums else moment
        counts[ref.path] = counts.get(ref.path, 0) + len(rows)

    handles = [model.get_submodule(ref.path).register_forward_hook(hook(ref)) for ref in layers]
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    try:
        with evaluating(model), torch.enable_grad():
            # One parameter must require gradients for the outputs to have some: the first, which costs the least.
            first = next(iter(model.parameters()))
            for parameter in model.parameters():
                parameter.requires_grad_(parameter is first)
            for number, batch in enumerate(calibration):
                current = loss_terms(batch)
                terms += current
                loss = calibration.loss(model, batch)
                torch.autograd.grad(loss, [first], allow_unused=True)
                if progress:
                    progress(number + 1, len(calibration))
    finally:
        for handle in handles:
            handle.remove()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(required[name])
    return {path: OutputGradients(total / counts[path], counts[path], terms) for path, total in sums.items()}


def weight_gradients(model: nn.Module, calibration: Calibration, refs: Sequence[LayerRef]) -> dict[str, Tensor]:
    """Gradient of the mean loss for each weight of `refs`, ``(count, out, in)`` float32, averaged over batches.

    Memory: one more copy of those weights in float32.
    """
    parameters = {ref.path: get_parameter(model, ref.parameter) for ref in refs}
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    sums = {ref.path: torch.zeros_like(parameters[ref.path], dtype=torch.float32) for ref in refs}
    weight = 0
    try:
        with evaluating(model), torch.enable_grad(), eager_experts(model):
            for parameter in model.parameters():
                parameter.requires_grad_(False)
            for weight_tensor in parameters.values():
                weight_tensor.requires_grad_(True)
            for batch in calibration:
                loss = calibration.loss(model, batch)
                found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
                count = loss_terms(batch)
                weight += count
                for path, gradient in zip(parameters, found, strict=True):
                    if gradient is not None:
                        sums[path] += count * gradient.float()
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(required[name])
    return {ref.path: to_matrices(sums[ref.path] / weight, ref.layout) for ref in refs}
