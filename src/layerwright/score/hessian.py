"""Trace of the loss's Hessian per layer, by Hutchinson's estimator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from layerwright.core.calibration import Calibration, evaluating
from layerwright.core.layer import LayerRef, get_parameter
from layerwright.score.gradients import loss_terms

__all__ = ["hessian_traces"]


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
    parameters = [get_parameter(model, ref.parameter) for ref in refs]
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    totals = [0.0] * len(refs)
    generator = torch.Generator().manual_seed(seed)
    terms = 0
    try:
        with evaluating(model), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            for parameter in model.parameters():
                parameter.requires_grad_(False)
            for weight in parameters:
                weight.requires_grad_(True)
            for batch in calibration:
                count = loss_terms(batch)
                terms += count
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
                            totals[i] += count * float((second.float() * signs[i].float()).sum()) / samples
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(required[name])
    return {ref.path: value / max(terms, 1) for ref, value in zip(refs, totals, strict=True)}
