"""Layers that compute as if quantized while weight, ranges and bias stay trainable."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwright.core.calibration import as_calibration, evaluating
from layerwright.core.errors import InputError, unknown_name
from layerwright.nn.conv_settings import ConvSettings
from layerwright.treat.fold import FOLDED_MEAN, FOLDED_STD
from layerwright.tune._affine import Ranges, affine_codes, affine_quantize, check_bits, mse_range, nelder_mead_range

__all__ = ["Bits", "FakeQuantized", "fake_layers", "full_precision", "quantize_layers", "recorded_inputs"]

Bits = tuple[int, int | None]
"""Bits of the weight and of the input; None leaves the input alone."""

SAMPLED = 1 << 15
"""Input values that a search for a range looks at."""

_TRANSPOSED = {nn.ConvTranspose1d: F.conv_transpose1d, nn.ConvTranspose2d: F.conv_transpose2d}


@dataclass(frozen=True)
class _Transposed:
    """The settings of a transposed convolution; its weight is kept as ``(out, in / groups, *kernel)``."""

    dimensions: int
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    output_padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def turn(self, weight: Tensor) -> Tensor:
        """``(in, out / groups, *kernel)`` as ``(out, in / groups, *kernel)``, and back: it is its own inverse."""
        split = weight.reshape(self.groups, -1, *weight.shape[1:])
        return split.transpose(1, 2).reshape(-1, split.shape[1], *weight.shape[2:])

    def run(self, x: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
        """The transposed convolution of `x`."""
        function: Any = F.conv_transpose1d if self.dimensions == 1 else F.conv_transpose2d
        result: Tensor = function(
            x, self.turn(rows), bias, self.stride, self.padding, self.output_padding, self.groups, self.dilation
        )
        return result


class FakeQuantized(nn.Module):
    """A linear layer or convolution whose weight (per output channel) and input (per tensor) go through a quantizer.

    Trainable, all float32: `weight` ``(out, ...)`` (it starts at `original_weight`, and moves continuously: rounding is
    decided anew in each forward), `bias` ``(out,)``, `weight_range` and `weight_low` ``(out,)``, `input_range` and
    `input_low` (scalars). With `enabled` False the layer computes what the original did.

    Raises:
        TypeError: not a plain linear layer or convolution.
        InputError: bits outside 2..16.
    """

    original_weight: Tensor
    original_bias: Tensor

    def __init__(self, source: nn.Module, weight_bits: int, input_bits: int | None = None) -> None:
        super().__init__()
        self.weight_bits = check_bits(weight_bits, "weight bits")
        self.input_bits = None if input_bits is None else check_bits(input_bits, "input bits")
        self.enabled = True
        self.settings = _settings(source)
        layer: Any = source
        weight: Tensor = layer.weight.detach().float()
        if isinstance(self.settings, _Transposed):
            weight = self.settings.turn(weight)
        bias = weight.new_zeros(weight.shape[0]) if layer.bias is None else layer.bias.detach().float().clone()
        self.weight, self.bias = nn.Parameter(weight.clone()), nn.Parameter(bias)
        self.register_buffer("original_weight", weight.clone(), persistent=False)
        self.register_buffer("original_bias", bias.clone(), persistent=False)
        for name in (FOLDED_MEAN, FOLDED_STD):
            self.register_buffer(name, getattr(source, name, None), persistent=False)
        low, high = weight.flatten(1).amin(1).clamp(max=0), weight.flatten(1).amax(1).clamp(min=0)
        self.weight_range, self.weight_low = nn.Parameter(high - low), nn.Parameter(low)
        self.input_range, self.input_low = (nn.Parameter(weight.new_tensor(v)) for v in (1.0, 0.0))
        self.training = source.training

    @property
    def change(self) -> Tensor:
        """``V``: how far the weight has moved before it is rounded."""
        return self.weight.detach() - self.original_weight

    @property
    def channel_axis(self) -> int:
        """The axis of the output that the weight's rows make, counted from the end."""
        return -1 if self.settings is None else 1 - self.weight.dim()

    def quantized_weight(self) -> Tensor:
        """The weight on its grid ``(out, ...)``."""
        return affine_quantize(
            self.weight, self._rows(self.weight_range), self._rows(self.weight_low), self.weight_bits
        )

    def codes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Integer codes of the weight ``(out, ...)`` in int32, scale and zero point ``(out,)``."""
        with torch.no_grad():
            codes, scale, zero = affine_codes(
                self.weight, self._rows(self.weight_range), self._rows(self.weight_low), self.weight_bits
            )
        return codes.int(), scale.flatten(), zero.flatten().int()

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output for `x`, in the dtype of `x`."""
        if not self.enabled:
            return self._run(x, self.original_weight, self.original_bias)
        if self.input_bits is not None:
            x = affine_quantize(x.float(), self.input_range, self.input_low, self.input_bits).to(x.dtype)
        return self._run(x, self.quantized_weight(), self.bias)

    @torch.no_grad()
    def measure_weight_(self, ranges: Ranges) -> None:
        """Set the weight's ranges from the original weight."""
        if ranges in ("mse", "nelder_mead"):
            span, low = mse_range(self.original_weight.flatten(1), self.weight_bits)
            self.weight_range.copy_(span)
            self.weight_low.copy_(low)

    @torch.no_grad()
    def measure_input_(self, inputs: Sequence[Tensor], ranges: Ranges) -> None:
        """Set the input's range from calibration inputs, a list of batches."""
        if self.input_bits is None:
            return
        if ranges in ("mean", "minmax"):
            low = torch.cat([x.float().flatten(1).amin(1) for x in inputs]).clamp(max=0)
            high = torch.cat([x.float().flatten(1).amax(1) for x in inputs]).clamp(min=0)
            low, high = (low.mean(), high.mean()) if ranges == "mean" else (low.amin(), high.amax())
            span = high - low
        else:
            values = torch.cat([x.float().flatten() for x in inputs])
            values = values[:: max(1, values.numel() // SAMPLED)]
            if ranges == "mse":
                span, low = (part[0] for part in mse_range(values.unsqueeze(0), self.input_bits))
            else:
                span, low = nelder_mead_range(values, self.input_bits)
        self.input_range.copy_(span)
        self.input_low.copy_(low)

    def multiply_adds(self, x: Tensor, output: Tensor) -> float:
        """Multiply-adds of one call that gave `output` for `x`, padding counted."""
        if isinstance(self.settings, _Transposed):  # each input value meets all the weights of its channel
            inputs = self.settings.turn(self.original_weight).shape[0]
            return x.numel() * self.weight.numel() / inputs
        return output.numel() * self.weight.numel() / self.weight.shape[0]

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{tuple(self.weight.shape)}, weight_bits={self.weight_bits}, input_bits={self.input_bits}"

    def _rows(self, values: Tensor) -> Tensor:
        return values.reshape(-1, *[1] * (self.weight.dim() - 1))

    def _run(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        weight, bias = weight.to(x.dtype), bias.to(x.dtype)
        return F.linear(x, weight, bias) if self.settings is None else self.settings.run(x, weight, bias)


def _settings(source: Any) -> ConvSettings | _Transposed | None:
    """How to run the layer; None for a linear one."""
    plain = type(source).forward
    if isinstance(source, nn.Linear) and plain is nn.Linear.forward:
        return None
    for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        if isinstance(source, kind) and plain is kind.forward:
            return ConvSettings.of(source)
    for transposed in _TRANSPOSED:
        if isinstance(source, transposed) and plain is transposed.forward:
            fields: Any = (source.stride, source.padding, source.output_padding, source.dilation, source.groups)
            return _Transposed(source.weight.dim() - 2, *fields)
    raise TypeError(
        f"{type(source).__name__} is not a plain linear layer or convolution, so it cannot be quantized here"
    )


def fake_layers(model: nn.Module, layers: Sequence[str] | None = None) -> dict[str, FakeQuantized]:
    """The fake-quantized layers of `model` by path, all of them or those named.

    Raises:
        InputError: one that was named does not exist or is not fake-quantized; or there are none at all.
    """
    found = {path: m for path, m in model.named_modules() if isinstance(m, FakeQuantized)}
    for path in layers or ():
        if path not in found:
            raise unknown_name("layer", path, found, "the fake-quantized layers")
    if not found:
        raise InputError("model: it has no fake-quantized layers; make them with quantize_layers first")
    return found if layers is None else {path: found[path] for path in layers}


@contextmanager
def full_precision(model: nn.Module) -> Iterator[None]:
    """Context: every fake-quantized layer of `model` computes what the original did."""
    layers = [m for m in model.modules() if isinstance(m, FakeQuantized)]
    before = [layer.enabled for layer in layers]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


@torch.no_grad()
def quantize_layers(model: nn.Module, data: Any, bits: Mapping[str, Bits], ranges: Ranges = "mse") -> nn.Module:
    """A copy of `model` in which the layers named in `bits` are `FakeQuantized`, their ranges measured on `data`.

    Inputs are those of the full-precision model. Memory: the inputs of one layer over the calibration.

    Raises:
        InputError: an unknown layer, one that does not run, bits outside 2..16.
        TypeError: a layer that is not a plain linear layer or convolution.
    """
    calibration = as_calibration(data)
    treated = copy.deepcopy(model)
    known = dict(treated.named_modules())
    for path, (weight_bits, input_bits) in bits.items():
        if path not in known or not path:
            raise unknown_name("layer", path, [name for name, m in known.items() if hasattr(m, "weight")], "bits")
        layer = FakeQuantized(known[path], weight_bits, input_bits)
        layer.measure_weight_(ranges)
        if input_bits is not None:
            with evaluating(model):
                inputs = recorded_inputs(model, model.get_submodule(path), calibration)
            if not inputs:
                raise InputError(f"{path}: does not run on the calibration, so its input has no range; leave it out")
            layer.measure_input_(inputs, ranges)
        treated.set_submodule(path, layer)
    return treated


@torch.no_grad()
def recorded_inputs(model: nn.Module, layer: nn.Module, data: Any, limit_bytes: int = 1 << 30) -> list[Tensor]:
    """Copies (on the CPU) of what goes into `layer` as `model` runs on `data`, up to `limit_bytes`; one per call."""
    seen: list[Tensor] = []
    used = 0

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal used
        x = args[0] if args else next(iter(kwargs.values()))
        if used < limit_bytes:
            # A copy, since what follows may add to the tensor in place.
            seen.append(x.detach().to("cpu", copy=True))
            used += x.numel() * x.element_size()

    handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        for batch in data:
            if used >= limit_bytes:
                break
            data.forward(model, batch)
    finally:
        handle.remove()
    return seen
