"""Sensitivities of fake-quantized models: one layer at a time takes another precision."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from layerwright.core.calibration import Calibration, as_calibration, evaluating
from layerwright.core.cost import Cost
from layerwright.core.errors import InputError
from layerwright.core.option import Option, OptionTable
from layerwright.core.treatment import Quantize
from layerwright.tune._fake_layers import FakeQuantized, fake_layers

__all__ = ["assemble_", "layer_swap", "option_bits"]

LEAST_DAMAGE = 1e-6


def layer_swap(base: nn.Module, variants: Sequence[nn.Module], data: Any) -> OptionTable:
    """Loss with one layer taken from a variant and all others at the base precision, minus the loss of `base`.

    ``dL[l, k] = max(L_k - L_base, 1e-6)``, and 0 for the base itself. The table's options cost ``params * bits / 8``
    bytes, and as ``flops`` the bit operations ``2 MACs * weight bits * input bits / 32**2`` of the first batch (a
    full-precision multiply-add is 2); give it to `layerwright.allocate.integer`. Cost: a forward over the data per
    layer and variant. Source: Hubara et al. (2020), arXiv 2006.10518.

    Args:
        base: every layer fake-quantized at the base precision (8 bits). Its layers are put back.
        variants: models with the same fake-quantized layers in other precisions.
        data: calibration with labels or a loss.

    Raises:
        InputError: a variant without one of the layers, labels that do not match the inputs, or a loss that is not
            finite; names the layer.
    """
    calibration = as_calibration(data)
    _check_labels(calibration)
    layers = fake_layers(base)
    base_loss = calibration.mean_loss(base)
    if not math.isfinite(base_loss):
        raise InputError(f"base: its loss on the calibration is {base_loss}; check the data and the ranges")
    macs = _multiply_adds(base, layers, calibration)
    options: list[Option] = []
    others = [fake_layers(variant, list(layers)) for variant in variants]
    for path, layer in layers.items():
        options.append(_option(path, layer, macs[path], 0.0))
        for other in others:
            try:
                base.set_submodule(path, other[path])
                loss = calibration.mean_loss(base)
            finally:
                base.set_submodule(path, layer)
            if not math.isfinite(loss):
                raise InputError(
                    f"{path}: its loss at {other[path].weight_bits} bits is {loss}, so it has no sensitivity"
                )
            options.append(_option(path, other[path], macs[path], max(loss - base_loss, LEAST_DAMAGE)))
    original = sum(layer.weight.numel() for layer in layers.values())
    whole = Cost(params=original, bytes=4.0 * original, flops=2.0 * sum(macs.values()))
    return OptionTable(tuple(options), original=whole, base_loss=base_loss)


def assemble_(base: nn.Module, variants: Sequence[nn.Module], bits: Mapping[str, int]) -> None:
    """Put into `base`, in place, each layer of `bits` in the form of the model that has it at that many weight bits.

    Modules are shared with the variants, not copied.

    Raises:
        InputError: no model has that layer at those bits.
    """
    models = [fake_layers(model) for model in (base, *variants)]
    for path, wanted in bits.items():
        found = [layers[path] for layers in models if path in layers and layers[path].weight_bits == wanted]
        if not found:
            raise InputError(f"{path}: no model has it at {wanted} bits")
        base.set_submodule(path, found[0])


def option_bits(chosen: Sequence[Option]) -> dict[str, int]:
    """Weight bits per layer of chosen options of `layer_swap`'s table."""
    return {option.layer: t.bits for option in chosen for t in option.treatments if isinstance(t, Quantize)}


@torch.no_grad()
def _multiply_adds(model: nn.Module, layers: Mapping[str, FakeQuantized], calibration: Calibration) -> dict[str, float]:
    """Multiply-adds of each layer on the first batch, all its calls together."""
    counts = dict.fromkeys(layers, 0.0)

    def watch(path: str) -> Any:
        def hook(layer: FakeQuantized, args: tuple[Any, ...], output: Tensor) -> None:
            counts[path] += layer.multiply_adds(args[0], output)

        return hook

    handles = [layer.register_forward_hook(watch(path)) for path, layer in layers.items()]
    try:
        with evaluating(model):
            calibration.forward(model, next(iter(calibration)))
    finally:
        for handle in handles:
            handle.remove()
    return counts


def _option(path: str, layer: FakeQuantized, macs: float, damage: float) -> Option:
    count = layer.weight.numel()
    if layer.weight_bits > 8:
        raise InputError(f"{path}: {layer.weight_bits} bits; a table of options holds 2 to 8")
    treatment = Quantize(bits=layer.weight_bits, group_size=-1, symmetric=False, method="rtn")
    operations = 2 * macs * layer.weight_bits * (layer.input_bits or 32) / 32**2
    cost = Cost(params=count, bytes=count * layer.weight_bits / 8, flops=operations)
    return Option(path, (treatment,), cost, damage)


def _check_labels(calibration: Calibration) -> None:
    for number, batch in enumerate(calibration):
        if isinstance(batch, Mapping):
            labels = batch.get("labels")
            inputs = next((v for k, v in batch.items() if k != "labels" and isinstance(v, Tensor)), None)
        else:
            inputs, labels = batch if isinstance(batch, tuple | list) and len(batch) == 2 else (None, None)
        if isinstance(labels, Tensor) and isinstance(inputs, Tensor) and labels.shape[:1] != inputs.shape[:1]:
            raise InputError(
                f"labels: batch {number} has shape {tuple(labels.shape)} for inputs {tuple(inputs.shape)}; "
                "expected one row of labels per sample"
            )
