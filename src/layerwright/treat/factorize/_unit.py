"""Factorised convolutions within a unit of treatment: dense while the unit runs, a chain in its place afterwards."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from layerwright.core.errors import InputError
from layerwright.core.layer import LayerRef, get_parameter
from layerwright.core.records import LayerRecord
from layerwright.core.storage import stored_bytes
from layerwright.core.treatment import FactorConv, Treatments, describe, weight_treatments
from layerwright.nn.conv_settings import ConvSettings
from layerwright.nn.factorized import FactorizedConv, stage_settings
from layerwright.nn.replace import _swap
from layerwright.nn.stored import Stored
from layerwright.treat.factorize._conv import composed_kernel, conv_kernels

__all__ = ["ConvChain", "chosen_factor", "factor_conv_", "place_chain_"]


@dataclass(frozen=True)
class ConvChain(Stored):
    """A factorised convolution before it stands in the model; `dense` is the kernel that it amounts to.

    Attributes:
        factor: how it was decomposed.
        kernels: weight of every stage.
    """

    factor: FactorConv = field(default_factory=FactorConv)
    kernels: Sequence[Tensor] = ()


def chosen_factor(treatments: Treatments) -> FactorConv | None:
    """The factorisation among `treatments`, None if there is none."""
    return next((t for t in treatments if isinstance(t, FactorConv)), None)


@torch.no_grad()
def factor_conv_(
    model: nn.Module, ref: LayerRef, treatments: Treatments, *, name: str = "", seed: int = 0
) -> tuple[ConvChain, LayerRecord]:
    """Factorise the convolution `ref`, and put the kernel that the chain amounts to in its place.

    Args:
        treatments: of this layer.
        name: of the layer in reports.
        seed: of CP.

    Raises:
        InputError: not a plain ``nn.Conv2d`` with one group, or a factorisation that it cannot have; names the layer.
    """
    factor = chosen_factor(treatments)
    name = name or ref.path
    module = model.get_submodule(ref.path) if ref.layout == "conv" else None
    if factor is None or not isinstance(module, nn.Conv2d) or type(module).forward is not nn.Conv2d.forward:
        kind = ref.kind if module is None else type(module).__name__
        raise InputError(f"{name}: factor_conv is for a plain nn.Conv2d, this is {kind}; leave this layer alone")
    if len(weight_treatments(treatments)) > 1:
        raise InputError(f"{name}: {describe(treatments)} cannot be combined on one layer; choose one")
    begun = time.perf_counter()
    weight = get_parameter(model, ref.parameter).detach()
    try:
        stage_settings(factor, ConvSettings.of(module))
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    kernels = [kernel.to(weight.dtype) for kernel in conv_kernels(weight, factor, seed=seed, name=name)]
    dense = composed_kernel(kernels, factor)
    matrix = dense.reshape(1, *ref.shape)
    chain = ConvChain((1, *ref.shape), dense=matrix, factor=factor, kernels=kernels)
    energy = float(weight.float().square().sum())
    off = float((weight.float() - dense).square().sum())
    module._parameters["weight"] = nn.Parameter(dense.to(weight.dtype), requires_grad=False)
    record = LayerRecord(
        layer=name,
        treatment=describe(treatments),
        status="done",
        reason="no calibration data needed",
        error=off / energy if energy else 0.0,
        tokens=0,
        bytes=stored_bytes(treatments, *ref.shape, ref.count, weight.element_size()),
        seconds=time.perf_counter() - begun,
    )
    return chain, record


@torch.no_grad()
def place_chain_(model: nn.Module, ref: LayerRef, chain: ConvChain) -> None:
    """Put the chain where the convolution `ref` stands; bias, dtype, device and training flag stay."""
    old = model.get_submodule(ref.path)
    weight = get_parameter(model, ref.parameter)
    bias = getattr(old, "bias", None)
    new = FactorizedConv.from_kernels(chain.kernels, chain.factor, ConvSettings.of(old), bias, weight.dtype)
    _swap(model, old, new.to(weight.device).train(old.training))
