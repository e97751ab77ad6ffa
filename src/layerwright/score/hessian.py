"""The loss's Hessian per layer: traces and diagonals by Hutchinson's estimator, top eigenvalues by power iteration."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from layerwright.core.calibration import Calibration, evaluating
from layerwright.core.layer import LayerRef, get_parameter, to_matrices
from layerwright.score.gradients import loss_terms

__all__ = ["hessian_diagonals", "hessian_traces", "top_eigenvalues"]


def hessian_traces(
    model: nn.Module, calibration: Calibration, refs: Sequence[LayerRef], *, samples: int = 4, seed: int = 0
) -> dict[str, float]:
    """``tr(H_l)`` of the mean loss for the weight of every layer: the mean of ``v^T H v`` over random signs ``v``.

    One probe serves all layers at once, since signs of different layers are independent: each layer's share
    ``v_l^T (H v)_l`` is unbiased for its own trace. Costs two backward passes per batch and sample; the attention runs
    by its plain formula, which can be differentiated twice.

    Raises:
        InputError: never; a layer that the loss does not depend on gets 0.
    """
    totals = [0.0] * len(refs)

    def add(i: int, share: float, product: Tensor) -> None:
        totals[i] += share * float(product.sum())

    _probe(model, calibration, refs, samples, seed, add)
    return {ref.path: value for ref, value in zip(refs, totals, strict=True)}


def hessian_diagonals(
    model: nn.Module, calibration: Calibration, refs: Sequence[LayerRef], *, samples: int = 4, seed: int = 0
) -> dict[str, Tensor]:
    """The diagonal of the Hessian of the mean loss for every weight, ``(count, out, in)`` float32: ``E[v * H v]``.

    The same probes as `hessian_traces` (Bekas et al., 2007); its sum is that trace. Memory: one more copy of those
    weights in float32.
    """
    weights = [get_parameter(model, ref.parameter) for ref in refs]
    sums = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    _probe(model, calibration, refs, samples, seed, lambda i, share, product: sums[i].add_(product, alpha=share))
    return {ref.path: to_matrices(total, ref.layout) for ref, total in zip(refs, sums, strict=True)}


def _probe(
    model: nn.Module,
    calibration: Calibration,
    refs: Sequence[LayerRef],
    samples: int,
    seed: int,
    add: Callable[[int, float, Tensor], object],
) -> None:
    """Call ``add(layer number, weight, v * H v)`` for each batch and sample; the weights sum to 1."""
    parameters = [get_parameter(model, ref.parameter) for ref in refs]
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(seed)
    terms = max(sum(loss_terms(batch) for batch in calibration), 1)
    try:
        with evaluating(model), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            for parameter in model.parameters():
                parameter.requires_grad_(False)
            for weight in parameters:
                weight.requires_grad_(True)
            for batch in calibration:
                share = loss_terms(batch) / terms / samples
                loss = calibration.loss(model, batch)
                gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
                used = [i for i, gradient in enumerate(gradients) if gradient is not None and gradient.requires_grad]
                for number in range(samples):
                    signs = [
                        (torch.randint(2, p.shape, generator=generator).float() * 2 - 1).to(p.device, p.dtype)
                        for p in parameters
                    ]
                    product = sum(((gradients[i] * signs[i]).sum() for i in used), torch.zeros(()))  # type: ignore[operator]
                    seconds = torch.autograd.grad(
                        product, [parameters[i] for i in used], retain_graph=number + 1 < samples, allow_unused=True
                    )
                    for i, second in zip(used, seconds, strict=True):
                        if second is not None:
                            add(i, share, second.float() * signs[i].float())
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(required[name])


def top_eigenvalues(
    model: nn.Module, calibration: Calibration, refs: Sequence[LayerRef], *, iterations: int = 10, seed: int = 0
) -> dict[str, float]:
    """Eigenvalue of largest magnitude of each layer's own block of the Hessian, by power iteration (HAWQ, Dong et al.,
    2019).

    Costs a second backward pass per layer, iteration and batch. Memory: the graphs of all batches, so give a small
    calibration. A layer that the loss does not depend on, or only linearly, gets 0.
    """
    parameters = [get_parameter(model, ref.parameter) for ref in refs]
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(seed)
    terms = max(sum(loss_terms(batch) for batch in calibration), 1)
    found: dict[str, float] = {}
    try:
        with evaluating(model), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            for parameter in model.parameters():
                parameter.requires_grad_(False)
            for weight in parameters:
                weight.requires_grad_(True)
            total = sum(
                (calibration.loss(model, batch) * (loss_terms(batch) / terms) for batch in calibration), torch.zeros(())
            )
            gradients = torch.autograd.grad(total, parameters, create_graph=True, allow_unused=True)
            for ref, weight, gradient in zip(refs, parameters, gradients, strict=True):
                found[ref.path] = _power(weight, gradient, iterations, generator)
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(required[name])
    return found


def _power(weight: Tensor, gradient: Tensor | None, iterations: int, generator: torch.Generator) -> float:
    """Rayleigh quotient after `iterations` products with the Hessian of one weight."""
    if gradient is None or not gradient.requires_grad:
        return 0.0
    vector = torch.randn(weight.shape, generator=generator).to(weight.device)
    value = 0.0
    for _ in range(iterations):
        vector = vector / vector.norm().clamp(min=1e-30)
        (product,) = torch.autograd.grad(
            gradient, weight, vector.to(gradient.dtype), retain_graph=True, allow_unused=True
        )
        if product is None:
            return 0.0
        value = float((product.float() * vector).sum())
        vector = product.float()
    return value
