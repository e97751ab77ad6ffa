"""Layers whose weight is a product of two thin matrices."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from layerwright.core.errors import InputError
from layerwright.nn.conv_settings import ConvSettings
from layerwright.nn.quantized import QuantConv, QuantLinear
from layerwright.nn.stored import Stored
from layerwright.nn.treated import dtype_name, named_dtype, owned

__all__ = ["LowRankConv", "LowRankLinear", "factors"]


class LowRankLinear(nn.Module):
    """``x @ right.T @ left.T + bias``: `right` ``(rank, in)`` first, then `left` ``(out, rank)``.

    Each factor is an ``nn.Linear`` (trainable) or a `QuantLinear`. Bytes and multiplications shrink by the same
    share, ``rank * (in + out) / (in * out)``, in every dtype and on every device.
    """

    def __init__(self, left: nn.Linear | QuantLinear, right: nn.Linear | QuantLinear) -> None:
        super().__init__()
        self.left, self.right = left, right

    @classmethod
    def from_stored(cls, stored: Stored, bias: Tensor | None, dtype: torch.dtype) -> LowRankLinear:
        """A layer that holds the factors of `stored` (one matrix), with `bias` ``(out,)``."""
        left, right = factors(stored)
        return cls(_linear(left, bias, dtype), _linear(right, None, dtype))

    @classmethod
    def empty(cls, spec: Mapping[str, Any]) -> LowRankLinear:
        """A layer of that form with uninitialised tensors."""
        return cls(_empty_linear(spec["left"]), _empty_linear(spec["right"]))

    def spec(self) -> dict[str, Any]:
        """Plain data from which `empty` builds the same form."""
        return {"type": "low_rank_linear", "left": _linear_spec(self.left), "right": _linear_spec(self.right)}

    @property
    def in_features(self) -> int:
        """Size of the input."""
        return self.right.in_features

    @property
    def out_features(self) -> int:
        """Size of the output."""
        return self.left.out_features

    @property
    def bias(self) -> Tensor | None:
        """The bias ``(out,)``."""
        return self.left.bias

    @property
    def weight(self) -> Tensor:
        """The product of the factors, dense ``(out, in)``, made anew."""
        return self.dequantize(self.left.weight.dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The product of the factors ``(out, in)``, multiplied in float32."""
        left, right = (_dense(factor) for factor in (self.left, self.right))
        return (left.float() @ right.float()).to(dtype or left.dtype)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The product with another `bias`: for a layer that shares this weight."""
        return nn.functional.linear(self.right(x), self.left.weight, bias)

    def forward(self, x: Tensor) -> Tensor:
        """`x` is ``(..., in_features)``."""
        result: Tensor = self.left(self.right(x))
        return result


class LowRankConv(nn.Module):
    """A convolution as a ``k x k`` one with `rank` outputs and a ``1 x 1`` one after it.

    With several groups the first one runs on each group's channels with the same `rank` kernels, as the shared factor
    of a grouped weight asks, and the second one is grouped.
    """

    def __init__(self, left: nn.Module, right: nn.Module, groups: int = 1) -> None:
        super().__init__()
        self.left, self.right, self.groups = left, right, groups

    @classmethod
    def from_stored(
        cls, stored: Stored, bias: Tensor | None, dtype: torch.dtype, settings: ConvSettings
    ) -> LowRankConv:
        """A convolution of those `settings` that holds the factors of `stored` (one matrix)."""
        left, right = factors(stored)
        first, second = _split(settings, right.shape[1])
        return cls(_conv(left, bias, dtype, second), _conv(right, None, dtype, first), settings.groups)

    @classmethod
    def empty(cls, spec: Mapping[str, Any]) -> LowRankConv:
        """A convolution of that form with uninitialised tensors."""
        return cls(_empty_conv(spec["left"]), _empty_conv(spec["right"]), spec["groups"])

    def spec(self) -> dict[str, Any]:
        """Plain data from which `empty` builds the same form."""
        return {
            "type": "low_rank_conv",
            "groups": self.groups,
            "left": _conv_spec(self.left),
            "right": _conv_spec(self.right),
        }

    @property
    def bias(self) -> Tensor | None:
        """The bias ``(out,)``."""
        bias: Tensor | None = self.left.bias  # type: ignore[assignment]
        return bias

    @property
    def weight(self) -> Tensor:
        """The dense kernel ``(out, in / groups, *kernel_size)``, made anew."""
        left, right = (factor.weight for factor in (self.left, self.right))
        assert isinstance(left, Tensor)
        assert isinstance(right, Tensor)
        return (left.flatten(1).float() @ right.flatten(1).float()).to(left.dtype).view(left.shape[0], *right.shape[1:])

    def forward(self, x: Tensor) -> Tensor:
        """`x` is ``(batch, in_channels, *size)``, or without the batch dimension."""
        if self.groups == 1:
            return self.left(self.right(x))  # type: ignore[no-any-return]
        settings = _conv_settings(self.left)
        single = x.ndim == len(settings.kernel_size) + 1
        batch = x.unsqueeze(0) if single else x
        inner = self.right(batch.reshape(batch.shape[0] * self.groups, -1, *batch.shape[2:]))
        y: Tensor = self.left(inner.reshape(batch.shape[0], settings.in_channels, *inner.shape[2:]))
        return y.squeeze(0) if single else y


def factors(stored: Stored) -> tuple[Stored, Stored]:
    """The left and the right factor of one matrix.

    Raises:
        InputError: no factors, or several matrices.
    """
    if stored.factors is None or stored.shape[0] != 1:
        raise InputError(f"stored: expected the factors of one matrix, got shape {stored.shape}")
    return stored.factors


def _one(stored: Stored, dtype: torch.dtype) -> Tensor:
    if stored.dense is None:
        raise InputError("stored: a factor is neither dense nor quantized")
    return owned(stored.dense, dtype, stored.shape[1:])


def _linear(stored: Stored, bias: Tensor | None, dtype: torch.dtype) -> nn.Linear | QuantLinear:
    if stored.codes is not None:
        return QuantLinear.from_stored(stored, bias, dtype)
    module = nn.Linear(stored.shape[2], stored.shape[1], bias=bias is not None, device="meta", dtype=dtype)
    module.weight = nn.Parameter(_one(stored, dtype))
    if bias is not None:
        module.bias = nn.Parameter(owned(bias, dtype, bias.shape))
    return module


def _linear_spec(module: nn.Linear | QuantLinear) -> dict[str, Any]:
    if isinstance(module, QuantLinear):
        return module.spec()
    return {
        "type": "linear",
        "in_features": module.in_features,
        "out_features": module.out_features,
        "bias": module.bias is not None,
        "dtype": dtype_name(module.weight.dtype),
    }


def _empty_linear(spec: Mapping[str, Any]) -> nn.Linear | QuantLinear:
    if spec["type"] == "quant_linear":
        return QuantLinear.empty(spec)
    arguments = {key: value for key, value in spec.items() if key not in ("type", "dtype")}
    with torch.device("meta"):
        module = nn.Linear(**arguments, dtype=named_dtype(spec["dtype"]))
    return module.to_empty(device=torch.get_default_device())


def _split(settings: ConvSettings, rank: int) -> tuple[ConvSettings, ConvSettings]:
    """Settings of the two convolutions: all groups of the first one share its kernels."""
    ones = (1,) * len(settings.kernel_size)
    first = dataclasses.replace(
        settings, in_channels=settings.in_channels // settings.groups, out_channels=rank, groups=1
    )
    return first, ConvSettings(
        rank * settings.groups, settings.out_channels, ones, ones, (0,) * len(ones), ones, settings.groups
    )


def _conv(stored: Stored, bias: Tensor | None, dtype: torch.dtype, settings: ConvSettings) -> nn.Module:
    if stored.codes is not None:
        return QuantConv.from_stored(stored, bias, dtype, settings)
    with torch.device("meta"):
        module = settings.module(bias is not None, dtype)
    module.weight = nn.Parameter(settings.kernel(_one(stored, dtype)))
    if bias is not None:
        module.bias = nn.Parameter(owned(bias, dtype, bias.shape))
    return module


def _conv_settings(module: nn.Module) -> ConvSettings:
    return module.settings if isinstance(module, QuantConv) else ConvSettings.of(module)


def _conv_spec(module: nn.Module) -> dict[str, Any]:
    if isinstance(module, QuantConv):
        return module.spec()
    assert isinstance(module.weight, Tensor)
    return {
        "type": "conv",
        "conv": ConvSettings.of(module).to_data(),
        "bias": module.bias is not None,
        "dtype": dtype_name(module.weight.dtype),
    }


def _empty_conv(spec: Mapping[str, Any]) -> nn.Module:
    if spec["type"] == "quant_conv":
        return QuantConv.empty(spec)
    with torch.device("meta"):
        module = ConvSettings(**spec["conv"]).module(spec["bias"], named_dtype(spec["dtype"]))
    return module.to_empty(device=torch.get_default_device())


def _dense(module: nn.Linear | QuantLinear) -> Tensor:
    return module.dequantize() if isinstance(module, QuantLinear) else module.weight
