"""AdaQuant's repairs as tuners of a carried-out plan."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from layerwright.core.calibration import as_calibration
from layerwright.core.errors import InputError
from layerwright.nn.quantized import QuantConv, QuantLinear
from layerwright.nn.stored import Stored
from layerwright.tune._fake_layers import FakeQuantized, quantize_layers
from layerwright.tune.adaquant import AdaQuant
from layerwright.tune.bias_tune import bias_tune
from layerwright.tune.renormalize import renormalize

__all__ = ["adaquant_tuner", "bias_tuner", "renormalize_tuner"]


def renormalize_tuner(
    model: nn.Module, calibration: Any, *, teacher: nn.Module | None = None, seed: int = 0, passes: int = 1
) -> nn.Module:
    """`renormalize` in place, with the statistics of `teacher`; `seed` is not used, since nothing is random."""
    renormalize(model, calibration, teacher, passes)
    return model


def bias_tuner(
    model: nn.Module,
    calibration: Any,
    *,
    teacher: nn.Module | None = None,
    seed: int = 0,
    epochs: int = 10,
    rate: float = 1e-4,
) -> nn.Module:
    """`bias_tune` in place; `seed` is not used, since nothing is random.

    Raises:
        InputError: no teacher.
    """
    bias_tune(model, _known(teacher), calibration, epochs=epochs, rate=rate)
    return model


def adaquant_tuner(
    model: nn.Module,
    calibration: Any,
    *,
    teacher: nn.Module | None = None,
    seed: int = 0,
    iters: int = 1000,
    batch_size: int = 50,
    mode: Literal["parallel", "sequential"] = "parallel",
    passes: int = 1,
    epochs: int = 10,
) -> nn.Module:
    """AdaQuant, re-normalisation and bias tuning of the quantized layers of `model`, in place.

    Layers with asymmetric codes per channel are fitted anew from the teacher's weights; others (groups, symmetric, or
    inside of something else than a plain layer) only take part in the two repairs that follow.

    Raises:
        InputError: no teacher, or no quantized layers.
    """
    source = _known(teacher)
    data = as_calibration(calibration)
    treated = {path: m for path, m in model.named_modules() if isinstance(m, QuantLinear | QuantConv)}
    fitted = {path: m for path, m in treated.items() if _fits(m, dict(source.named_modules()).get(path))}
    if fitted:
        bits: dict[str, tuple[int, int | None]] = {path: (m.quantize.bits, None) for path, m in fitted.items()}
        fake = quantize_layers(source, data, bits)
        AdaQuant(iters=iters, batch_size=batch_size, mode=mode, seed=seed).fit(fake, data)
        for path, module in fitted.items():
            layer = fake.get_submodule(path)
            assert isinstance(layer, FakeQuantized)
            _write(module, layer)
    renormalize(model, data, source, passes)
    # Layers all have a bias now: re-normalisation gave them one.
    bias_tune(model, source, data, epochs=epochs)
    return model


def _known(teacher: nn.Module | None) -> nn.Module:
    if teacher is None:
        raise InputError("teacher: the full-precision model is needed to learn from; give teacher=")
    return teacher


def _fits(module: QuantLinear | QuantConv, source: nn.Module | None) -> bool:
    quantize = module.quantize
    plain = type(source) in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return plain and not quantize.symmetric and quantize.act_bits is None and module.weight_scale.shape[-1] == 1


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
