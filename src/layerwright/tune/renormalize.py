"""Para-normalization: bring back the mean and deviation of each quantized layer's output."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from layerwright.core.calibration import Calibration, as_calibration, evaluating
from layerwright.core.errors import InputError, unknown_name
from layerwright.nn.quantized import QuantConv, QuantLinear
from layerwright.treat.fold import FOLDED_MEAN, FOLDED_STD
from layerwright.tune._fake_layers import FakeQuantized, full_precision

__all__ = [
    "LiveNorm",
    "Statistics",
    "fold_norms_",
    "insert_norms",
    "quantized_layers",
    "renormalize",
    "renormalize_",
    "statistics_of",
]

EPS = 1e-5

Statistics = tuple[Tensor, Tensor]
"""Mean and standard deviation ``(out,)`` of a layer's full-precision output."""

Layer = FakeQuantized | QuantLinear | QuantConv

M = TypeVar("M", bound=nn.Module)


@dataclass
class LiveNorm:
    """A normalisation that runs on a layer's output: `norm` on values ``(positions, out)``; `remove` takes it away."""

    layer: Layer
    norm: nn.BatchNorm1d
    handle: Any

    def remove(self) -> None:
        """Stop running."""
        self.handle.remove()


def renormalize(
    model: M, data: Any, reference: nn.Module | None = None, passes: int = 1, momentum: float | None = None
) -> M:
    """A copy of `model` whose quantized layers have the full-precision mean and deviation per channel: `renormalize_`."""
    corrected = copy.deepcopy(model)
    renormalize_(corrected, data, reference, passes, momentum)
    return corrected


def renormalize_(
    model: nn.Module, data: Any, reference: nn.Module | None = None, passes: int = 1, momentum: float | None = None
) -> dict[str, Statistics]:
    """Correct each quantized layer in place so that its output has the full-precision mean and deviation per channel.

    A batch normalisation that starts as the identity is put behind every quantized layer, its statistics are measured
    again on the quantized outputs in training mode, and it is folded: ``W <- f W`` with
    ``f = gain / sqrt(var + eps) > 0``, the quantizer's range and minimum alike, so that integer codes do not change;
    ``b <- f (b - mean) + shift``. Source: Hubara et al. (2020), arXiv 2006.10518, "para-normalization".

    Args:
        model: with fake-quantized layers (`quantize_layers`) or quantized ones (a carried-out plan).
        data: calibration; no labels are needed. Every layer must get at least two values per channel in each batch.
        reference: the full-precision model, in which layers have the same paths. By default each layer's folded batch
            normalisation tells the statistics, or else the layer's own full-precision form.
        passes: walks over the data.
        momentum: of the running statistics; None averages all batches alike (0.1 needs several passes).

    Returns:
        What was corrected: layer path to the measured mean and deviation.

    Raises:
        InputError: no quantized layers, `passes` below 1, a layer without a known full-precision output, or a batch
            with a single value per channel.
    """
    if passes < 1:
        raise InputError(f"passes: got {passes}, expected at least 1")
    calibration = as_calibration(data)
    wanted = statistics_of(model, calibration, reference)
    live = insert_norms(model, wanted, momentum)
    try:
        with evaluating(model), torch.no_grad():
            for item in live.values():
                item.norm.train()
            for _ in range(passes):
                for batch in calibration:
                    calibration.forward(model, batch)
            for item in live.values():
                item.norm.eval()
    except BaseException:
        for item in live.values():
            item.remove()
        raise
    return fold_norms_(live)


def quantized_layers(model: nn.Module) -> dict[str, Layer]:
    """Layers whose codes `renormalize` keeps, by path.

    Raises:
        InputError: there are none.
    """
    found = {path: m for path, m in model.named_modules() if isinstance(m, FakeQuantized | QuantLinear | QuantConv)}
    if not found:
        raise InputError("model: it has no quantized layers to renormalize")
    return found


def statistics_of(
    model: nn.Module, calibration: Calibration, reference: nn.Module | None = None
) -> dict[str, Statistics]:
    """Mean and deviation of each quantized layer's full-precision output: remembered from folding, or measured."""
    layers = quantized_layers(model)
    known: dict[str, Statistics] = {}
    modules = {} if reference is None else dict(reference.named_modules())
    for path, layer in layers.items():
        if reference is not None and path not in modules:
            raise unknown_name("layer", path, modules, "the reference")
        owner: Any = layer if reference is None else modules[path]
        mean, std = getattr(owner, FOLDED_MEAN, None), getattr(owner, FOLDED_STD, None)
        if isinstance(mean, Tensor) and isinstance(std, Tensor):
            known[path] = (mean, std)
        elif reference is None and not isinstance(layer, FakeQuantized):
            raise InputError(f"{path}: its full-precision output is not known; give reference=, the model before")
    missing = {path: layer for path, layer in layers.items() if path not in known}
    if missing:
        source = model if reference is None else reference
        watched = {path: source.get_submodule(path) for path in missing}
        axes = {path: _channel_axis(layer) for path, layer in missing.items()}
        with evaluating(source), full_precision(source):
            known |= _measure(source, watched, axes, calibration)
    return {path: known[path] for path in layers if path in known}


def insert_norms(
    model: nn.Module, statistics: Mapping[str, Statistics], momentum: float | None = None
) -> dict[str, LiveNorm]:
    """Put a batch normalisation that is the identity in evaluation mode behind each layer of `statistics`.

    Mean and shift are the given mean, variance is the squared deviation, gain is ``sqrt(variance + eps)``.
    """
    layers = quantized_layers(model)
    live: dict[str, LiveNorm] = {}
    for path, (mean, std) in statistics.items():
        layer = layers[path]
        norm = nn.BatchNorm1d(len(mean), eps=EPS, momentum=momentum, device=mean.device).eval()
        with torch.no_grad():
            for value, start in ((norm.running_mean, mean), (norm.running_var, std.square()), (norm.bias, mean)):
                assert value is not None
                value.copy_(start)
            norm.weight.copy_((std.float().square() + EPS).sqrt())
        live[path] = LiveNorm(layer, norm, layer.register_forward_hook(_applying(path, norm, _channel_axis(layer))))
    return live


@torch.no_grad()
def fold_norms_(live: Mapping[str, LiveNorm]) -> dict[str, Statistics]:
    """Make each live normalisation part of its layer and remove it; codes stay the same. Returns what was measured."""
    measured: dict[str, Statistics] = {}
    for path, item in live.items():
        norm, layer = item.norm, item.layer
        assert norm.running_mean is not None and norm.running_var is not None
        mean, var = norm.running_mean, norm.running_var
        gain = norm.weight / (var + norm.eps).sqrt()
        bias = torch.zeros_like(mean) if layer.bias is None else layer.bias.float()
        shifted = gain * (bias - mean) + norm.bias
        if isinstance(layer, FakeQuantized):
            shape = (-1, *[1] * (layer.weight.dim() - 1))
            layer.weight.mul_(gain.reshape(shape))
            layer.weight_range.mul_(gain)
            layer.weight_low.mul_(gain)
            layer.bias.copy_(shifted)
        else:
            scale = layer.weight_scale
            layer.weight_scale = (scale.float() * gain.reshape(-1, *[1] * (scale.dim() - 1))).to(scale.dtype)
            layer.bias = shifted.to(scale.dtype)
            layer.forget()
        item.remove()
        measured[path] = (mean.clone(), var.sqrt())
    return measured


def _applying(path: str, norm: nn.BatchNorm1d, axis: int) -> Any:
    def hook(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        moved = output.movedim(axis, -1)
        values = moved.reshape(-1, moved.shape[-1]).float()
        if norm.training and len(values) < 2:
            raise InputError(f"{path}: a batch gives one value per channel; use batches of at least two samples")
        result: Tensor = norm(values).to(output.dtype).reshape(moved.shape).movedim(-1, axis)
        return result

    return hook


@torch.no_grad()
def _measure(
    model: nn.Module, watched: Mapping[str, nn.Module], axes: Mapping[str, int], calibration: Calibration
) -> dict[str, Statistics]:
    """Mean and deviation of the outputs of the modules `watched`, in float64 sums."""
    sums: dict[str, list[Any]] = {}

    def watch(path: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
            values = output.movedim(axes[path], -1).flatten(0, -2).double()
            first, second, count = sums.get(path, [0.0, 0.0, 0])
            sums[path] = [first + values.sum(0), second + values.square().sum(0), count + len(values)]

        return hook

    handles = [module.register_forward_hook(watch(path)) for path, module in watched.items()]
    try:
        for batch in calibration:
            calibration.forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    result = {}
    for path, (first, second, count) in sums.items():
        mean = first / count
        result[path] = (mean.float(), (second / count - mean.square()).clamp(min=0).sqrt().float())
    return result


def _channel_axis(layer: Layer) -> int:
    if isinstance(layer, FakeQuantized):
        return layer.channel_axis
    return -1 if isinstance(layer, QuantLinear) else -1 - len(layer.settings.kernel_size)
