"""AdaQuant's repairs as tuners of a carried-out plan."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import nn

from layerwright.core.calibration import Calibration, as_calibration, evaluating
from layerwright.core.errors import InputError, unknown_name
from layerwright.nn.quantized import QuantConv, QuantLinear
from layerwright.nn.stored import Stored
from layerwright.tune._absorb import absorb_biases_
from layerwright.tune._fake_layers import FakeQuantized, quantize_layers
from layerwright.tune.adaquant import AdaQuant
from layerwright.tune.bias_tune import bias_tune, bias_tune_, divergence
from layerwright.tune.renormalize import renormalize

__all__ = ["adaquant_tuner", "bias_tuner", "renormalize_tuner"]


def renormalize_tuner(
    model: nn.Module, calibration: Any, *, teacher: nn.Module | None = None, seed: int = 0, passes: int = 1
) -> nn.Module:
    """`renormalize` with the statistics of `teacher`; `seed` is not used, since nothing is random.

    With a teacher the correction is kept only if the divergence from it on the calibration fell: where quantization
    did next to no harm, bringing statistics back does more. A bias that a convolution
    did not have goes into the BatchNorm behind it, if there is one, so that the planned bytes hold.
    """
    if teacher is None:
        return renormalize(model, calibration, None, passes)
    data = as_calibration(calibration)
    corrected = _renormalized(model, data, teacher, passes)
    absorb_biases_(corrected, _without_bias(model), data)
    return corrected


def bias_tuner(
    model: nn.Module,
    calibration: Any,
    *,
    teacher: nn.Module | None = None,
    seed: int = 0,
    epochs: int = 10,
    rate: float = 1e-4,
) -> nn.Module:
    """`bias_tune`; `seed` is not used, since nothing is random.

    Raises:
        InputError: no teacher.
    """
    return bias_tune(model, _known(teacher), calibration, epochs=epochs, rate=rate)


def adaquant_tuner(
    model: nn.Module,
    calibration: Any,
    *,
    teacher: nn.Module | None = None,
    seed: int = 0,
    iters: int = 1000,
    batch_size: int = 50,
    mode: Literal["parallel", "sequential"] = "parallel",
    start: Literal["weights", "plan"] = "weights",
    passes: int = 1,
    epochs: int = 10,
) -> nn.Module:
    """A copy of `model` whose quantized layers went through AdaQuant, re-normalisation and bias tuning.

    The two repairs are kept only if they lowered the divergence from the teacher on the calibration.

    Layers with asymmetric codes per channel are fitted; others (groups, symmetric, or inside of something else than a
    plain layer) only take part in the two repairs that follow.

    Args:
        start: ``weights`` fits anew from the teacher's weights with ranges of least squared error, as published;
            ``plan`` goes on from the codes and ranges of `model`, such as those of GPTQ, and keeps them in a layer
            where no step lowered the error on the samples that are kept back.

    Raises:
        InputError: no teacher, no quantized layers, or an unknown `start`.
    """
    if start not in ("weights", "plan"):
        raise unknown_name("start", str(start), ("weights", "plan"), "adaquant")
    source = _known(teacher)
    data = as_calibration(calibration)
    tuned = copy.deepcopy(model)
    treated = {path: m for path, m in tuned.named_modules() if isinstance(m, QuantLinear | QuantConv)}
    fitted = {path: m for path, m in treated.items() if _fits(m, dict(source.named_modules()).get(path))}
    if fitted:
        bits: dict[str, tuple[int, int | None]] = {path: (m.quantize.bits, None) for path, m in fitted.items()}
        fake = quantize_layers(source, data, bits)
        for path, module in fitted.items() if start == "plan" else ():
            _read(module, fake.get_submodule(path))
        AdaQuant(iters=iters, batch_size=batch_size, mode=mode, seed=seed).fit(fake, data)
        for path, module in fitted.items():
            layer = fake.get_submodule(path)
            assert isinstance(layer, FakeQuantized)
            _write(module, layer)
    tuned = _renormalized(tuned, data, source, passes)
    _give_biases_(tuned)
    bias_tune_(tuned, source, data, epochs=epochs)
    absorb_biases_(tuned, _without_bias(model), data)
    return tuned


def _renormalized(model: nn.Module, data: Calibration, teacher: nn.Module, passes: int) -> nn.Module:
    """A copy of `model`, re-normalised if that brings it closer to `teacher`."""
    corrected = renormalize(model, data, teacher, passes)
    with evaluating(model), evaluating(teacher), evaluating(corrected):
        closer = divergence(corrected, teacher, data) < divergence(model, teacher, data)
    return corrected if closer else copy.deepcopy(model)


def _without_bias(model: nn.Module) -> list[str]:
    return [path for path, m in model.named_modules() if isinstance(m, QuantLinear | QuantConv) and m.bias is None]


def _give_biases_(model: nn.Module) -> None:
    """A bias of zeros for each quantized layer that has none, so that there is one to tune."""
    for module in model.modules():
        if isinstance(module, QuantLinear | QuantConv) and module.bias is None:
            module.bias = module.weight_scale.new_zeros(module.rows)


def _known(teacher: nn.Module | None) -> nn.Module:
    if teacher is None:
        raise InputError("teacher: the full-precision model is needed to learn from; give teacher=")
    return teacher


def _fits(module: QuantLinear | QuantConv, source: nn.Module | None) -> bool:
    quantize = module.quantize
    plain = type(source) in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return plain and not quantize.symmetric and quantize.act_bits is None and module.weight_scale.shape[-1] == 1


@torch.no_grad()
def _read(module: QuantLinear | QuantConv, layer: nn.Module) -> None:
    """Let the fit start from the codes and ranges of `module`: signed codes move up by half the grid."""
    assert isinstance(layer, FakeQuantized) and module.weight_zero is not None
    levels, half = (1 << layer.weight_bits) - 1, 1 << (layer.weight_bits - 1)
    scale = module.weight_scale.float().flatten()
    layer.weight.copy_(module.matrix().float().reshape(layer.weight.shape))
    layer.weight_range.copy_(scale * levels)
    layer.weight_low.copy_(-(module.weight_zero.float().flatten() + half) * scale)


@torch.no_grad()
def _write(module: QuantLinear | QuantConv, layer: FakeQuantized) -> None:
    """Take over the codes: unsigned ones of the fit move down by half the grid to the signed ones that are stored."""
    codes, scale, zero = layer.codes()
    half = 1 << (layer.weight_bits - 1)
    shape = (1, module.rows, module.columns)
    stored = Stored(
        shape,
        codes=(codes - half).to(torch.int8).reshape(shape),
        scale=scale.reshape(1, -1, 1),
        zero=(zero - half).to(torch.int8).reshape(1, -1, 1),
        quantize=module.quantize,
    )
    module.fill_(stored)
    module.bias = layer.bias.detach().to(module.weight_scale.dtype).clone()
