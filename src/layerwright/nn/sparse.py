"""Layers with sparse weights: linear and convolution."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from layerwright.core.errors import InputError
from layerwright.core.treatment import Quantize
from layerwright.nn.conv_settings import ConvSettings
from layerwright.nn.quantized import copied
from layerwright.nn.quantized_weight import quantize_from_data
from layerwright.nn.sparse_weight import SparseWeight
from layerwright.nn.stored import Stored
from layerwright.nn.treated import TreatedLinear, named_dtype

__all__ = ["SparseConv", "SparseLinear", "sparse_arguments"]


class SparseLinear(TreatedLinear, SparseWeight):
    """A linear layer with a bit mask and the kept weights or codes; see `SparseWeight` for its bytes and its speed."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kept: int,
        quantize: Quantize | None,
        dtype: torch.dtype,
        *,
        bias: bool,
        static: bool = False,
    ) -> None:
        super().__init__((1, out_features, in_features), kept, quantize, dtype, static=static)
        self.register_buffer("bias", torch.empty(out_features, dtype=dtype) if bias else None)

    @classmethod
    def from_stored(cls, stored: Stored, bias: Tensor | None, dtype: torch.dtype) -> SparseLinear:
        """A layer that holds `stored` (one matrix with a mask), with `bias` ``(out,)`` and values in `dtype`."""
        kept, quantize, static = sparse_arguments(stored, 1)
        module = cls(stored.shape[2], stored.shape[1], kept, quantize, dtype, bias=bias is not None, static=static)
        module.fill_(stored)
        module.bias = copied(bias, dtype)
        return module

    @classmethod
    def empty(cls, spec: Mapping[str, Any]) -> SparseLinear:
        """A layer of that form with uninitialised buffers."""
        quantize = None if spec["quantize"] is None else quantize_from_data(spec["quantize"])
        return cls(
            spec["in_features"],
            spec["out_features"],
            spec["kept"],
            quantize,
            named_dtype(spec["dtype"]),
            bias=spec["bias"],
            static=spec["static"],
        )

    def spec(self) -> dict[str, Any]:
        """Plain data from which `empty` builds the same form."""
        return {
            "type": "sparse_linear",
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias is not None,
            **self._weight_spec(),
        }


class SparseConv(SparseWeight):
    """A convolution with a sparse weight: fewer bytes, and the time of a dense convolution plus the expansion."""

    bias: Tensor | None

    def __init__(
        self,
        settings: ConvSettings,
        kept: int,
        quantize: Quantize | None,
        dtype: torch.dtype,
        *,
        bias: bool,
        static: bool = False,
    ) -> None:
        super().__init__((1, settings.out_channels, settings.columns), kept, quantize, dtype, static=static)
        self.settings = settings
        self.register_buffer("bias", torch.empty(settings.out_channels, dtype=dtype) if bias else None)

    @classmethod
    def from_stored(cls, stored: Stored, bias: Tensor | None, dtype: torch.dtype, settings: ConvSettings) -> SparseConv:
        """A convolution that holds `stored` (one matrix with a mask)."""
        kept, quantize, static = sparse_arguments(stored, 1)
        module = cls(settings, kept, quantize, dtype, bias=bias is not None, static=static)
        module.fill_(stored)
        module.bias = copied(bias, dtype)
        return module

    @classmethod
    def empty(cls, spec: Mapping[str, Any]) -> SparseConv:
        """A convolution of that form with uninitialised buffers."""
        quantize = None if spec["quantize"] is None else quantize_from_data(spec["quantize"])
        dtype = named_dtype(spec["dtype"])
        return cls(
            ConvSettings(**spec["conv"]), spec["kept"], quantize, dtype, bias=spec["bias"], static=spec["static"]
        )

    def spec(self) -> dict[str, Any]:
        """Plain data from which `empty` builds the same form."""
        return {
            "type": "sparse_conv",
            "conv": self.settings.to_data(),
            "bias": self.bias is not None,
            **self._weight_spec(),
        }

    @property
    def weight(self) -> Tensor:
        """The dense kernel ``(out, in / groups, *kernel_size)``, made anew."""
        return self.settings.kernel(self.matrix())

    def forward(self, x: Tensor) -> Tensor:
        """The convolution of `x` ``(batch, in_channels, *size)``; without the batch dimension too."""
        if self.quantize is not None and self.quantize.act_bits:
            x = self.settings.round_input(x, self.input_scale)
        return self.settings.run(x, self.settings.kernel(self.matrix(0, x.dtype)), self.bias)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{self.settings}, kept={self.kept}, bias={self.bias is not None}"


def sparse_arguments(stored: Stored, count: int | None = None) -> tuple[int, Quantize | None, bool]:
    """Number of kept weights, quantizer settings and whether activations are static.

    Raises:
        InputError: no mask, or not `count` matrices.
    """
    if stored.mask is None or (count is not None and stored.shape[0] != count):
        raise InputError(f"stored: expected {count or 'some'} matrices with a mask, got shape {stored.shape}")
    quantize = stored.quantize if stored.codes is not None else None
    return int(stored.mask.sum()), quantize, stored.input_scale is not None
