"""Bias tuning: only biases learn, from the full-precision model's answers."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from layerwright.core.calibration import Calibration, as_calibration, evaluating, logits_of
from layerwright.core.errors import InputError
from layerwright.nn.quantized import QuantConv, QuantLinear
from layerwright.tune._fake_layers import FakeQuantized

__all__ = ["BiasFit", "bias_tune", "bias_tune_", "divergence"]

_LAYERS = (FakeQuantized, QuantLinear, QuantConv, nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class BiasFit:
    """What bias tuning did: KL divergence from the teacher before and after (nats), and the layers that learned."""

    before: float
    after: float
    layers: tuple[str, ...]


def bias_tune(
    model: M,
    teacher: nn.Module,
    data: Any,
    epochs: int = 10,
    rate: float = 1e-4,
    momentum: float = 0.9,
    ranges: bool = False,
) -> M:
    """A copy of `model` whose biases have learned from `teacher`; `bias_tune_` says how and does it in place."""
    tuned = copy.deepcopy(model)
    bias_tune_(tuned, teacher, data, epochs, rate, momentum, ranges)
    return tuned


def bias_tune_(
    model: nn.Module,
    teacher: nn.Module,
    data: Any,
    epochs: int = 10,
    rate: float = 1e-4,
    momentum: float = 0.9,
    ranges: bool = False,
) -> BiasFit:
    """Train the biases of `model` in place to lower ``KL(softmax(teacher) || softmax(model))`` on `data`.

    SGD at `rate` for 2 epochs, a tenth of it up to epoch 10, a hundredth after that. The classifier (the weight layer
    that runs last) is left out. Everything runs in evaluation mode, so that normalisations stay frozen. If the
    divergence on `data` did not fall, the biases are put back. Source: Hubara et al. (2020), arXiv 2006.10518.

    Args:
        model: with fake-quantized, quantized or plain layers; only existing biases learn.
        teacher: the full-precision model.
        data: calibration; no labels are needed.
        epochs: walks over the data.
        rate: first learning rate.
        momentum: of SGD.
        ranges: train the ranges of fake-quantized layers as well.

    Raises:
        InputError: no layer but the classifier has a bias, or negative `epochs`.
    """
    if epochs < 0:
        raise InputError(f"epochs: got {epochs}, expected at least 0")
    calibration = as_calibration(data)
    holders = _holders(model, calibration)
    tensors: list[Tensor] = [holder.bias for holder in holders.values()]
    if ranges:
        for holder in holders.values():
            if isinstance(holder, FakeQuantized):
                tensors += [holder.weight_range, holder.weight_low, holder.input_range, holder.input_low]
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    start = [tensor.detach().clone() for tensor in tensors]
    with evaluating(model), evaluating(teacher):
        before = divergence(model, teacher, calibration)
        try:
            for parameter in flags:
                parameter.requires_grad_(False)
            for tensor in tensors:
                tensor.requires_grad_(True)
            optimizer = torch.optim.SGD(tensors, lr=rate, momentum=momentum)
            for epoch in range(epochs):
                for group in optimizer.param_groups:
                    group["lr"] = rate * (1.0 if epoch < 2 else 0.1 if epoch < 10 else 0.01)
                for batch in calibration:
                    with torch.enable_grad():
                        _kl(model, teacher, calibration, batch).mean().backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
        finally:
            for tensor in tensors:
                tensor.grad = None
                tensor.requires_grad_(False)
            for parameter, flag in flags.items():
                parameter.requires_grad_(flag)
        after = divergence(model, teacher, calibration)
        if not after < before:
            after = before
            with torch.no_grad():
                for tensor, value in zip(tensors, start, strict=True):
                    tensor.copy_(value)
    return BiasFit(before, after, tuple(holders))


@torch.no_grad()
def divergence(model: nn.Module, teacher: nn.Module, calibration: Calibration) -> float:
    """Mean KL divergence of `model` from `teacher` over the rows of logits, in nats."""
    total = count = 0.0
    for batch in calibration:
        rows = _kl(model, teacher, calibration, batch)
        total, count = total + float(rows.sum()), count + rows.numel()
    return total / count


def _kl(model: nn.Module, teacher: nn.Module, calibration: Calibration, batch: Any) -> Tensor:
    """One number per row of logits."""
    with torch.no_grad():
        wanted = logits_of(calibration.forward(teacher, batch)).float().flatten(0, -2).log_softmax(-1)
    got = logits_of(calibration.forward(model, batch)).float().flatten(0, -2).log_softmax(-1)
    return (wanted.exp() * (wanted - got)).sum(-1)


def _holders(model: nn.Module, calibration: Calibration) -> dict[str, Any]:
    """Layers with a bias that run, by path; the one that runs last is the classifier and is left out."""
    order: dict[str, nn.Module] = {}

    def ran(path: str, module: nn.Module) -> None:
        order.pop(path, None)
        order[path] = module

    handles = [
        module.register_forward_pre_hook(lambda module, _args, path=path: ran(path, module))
        for path, module in model.named_modules()
        if isinstance(module, _LAYERS)
    ]
    try:
        with evaluating(model), torch.no_grad():
            calibration.forward(model, next(iter(calibration)))
    finally:
        for handle in handles:
            handle.remove()
    found = {path: module for path, module in list(order.items())[:-1] if getattr(module, "bias", None) is not None}
    if not found:
        raise InputError("model: no layer but the classifier has a bias to tune; fold its BatchNorms first")
    return found
