"""Layers with packed integer weights: linear, convolution, embedding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from layerwright.core.errors import InputError
from layerwright.core.treatment import Quantize
from layerwright.nn.conv_settings import ConvSettings
from layerwright.nn.packing import unpack
from layerwright.nn.quantized_weight import QuantizedWeight, quantize_from_data, scaled_codes
from layerwright.nn.stored import Stored
from layerwright.nn.treated import TreatedLinear, WeightView, named_dtype, owned

__all__ = ["QuantConv", "QuantEmbedding", "QuantLinear"]


class QuantLinear(TreatedLinear, QuantizedWeight):
    """A linear layer with a packed integer weight; see `QuantizedWeight` for its buffers and the memory it holds.

    In bfloat16 on an x86 CPU it multiplies the codes themselves while there are few input rows (decoding), which is
    faster than a dense weight because fewer bytes are read. With many rows, other dtypes and other devices it makes
    the dense weight for the call, in pieces of at most `layerwright.nn.treated.DENSE_CHUNK_BYTES`: about 1 to 2 ns per
    weight, so that few rows in float32 or float16 on a CPU take several times the time of a dense layer. With
    `act_bits` 8 it rounds its input to int8 as well and the product is one of integers (W8A8) at any number of rows.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        quantize: Quantize,
        dtype: torch.dtype,
        *,
        bias: bool,
        static: bool = False,
    ) -> None:
        super().__init__((1, out_features, in_features), quantize, dtype, static=static)
        self.register_buffer("bias", torch.empty(out_features, dtype=dtype) if bias else None)

    @classmethod
    def from_stored(cls, stored: Stored, bias: Tensor | None, dtype: torch.dtype) -> QuantLinear:
        """A layer that holds `stored` (one matrix), with `bias` ``(out,)`` and scales in `dtype`."""
        quantize, static = _settings(stored)
        module = cls(stored.shape[2], stored.shape[1], quantize, dtype, bias=bias is not None, static=static)
        module.fill_(stored)
        module.bias = copied(bias, dtype)
        return module

    @classmethod
    def empty(cls, spec: Mapping[str, Any]) -> QuantLinear:
        """A layer of that form with uninitialised buffers, for a state dict to fill."""
        quantize, dtype = quantize_from_data(spec["quantize"]), named_dtype(spec["dtype"])
        return cls(spec["in_features"], spec["out_features"], quantize, dtype, bias=spec["bias"], static=spec["static"])

    def spec(self) -> dict[str, Any]:
        """Plain data from which `empty` builds the same form."""
        return {
            "type": "quant_linear",
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias is not None,
            **self._weight_spec(),
        }


class QuantConv(QuantizedWeight):
    """A 1-, 2- or 3-dimensional convolution with a packed integer weight ``(out, in / groups * kernel)``.

    The dense kernel is made for each call, so that a convolution takes fewer bytes but no less time. A dynamic or
    static 8-bit input is rounded once for the whole image (per sample for `dynamic`).
    """

    bias: Tensor | None

    def __init__(
        self, settings: ConvSettings, quantize: Quantize, dtype: torch.dtype, *, bias: bool, static: bool = False
    ) -> None:
        super().__init__((1, settings.out_channels, settings.columns), quantize, dtype, static=static)
        self.settings = settings
        self.register_buffer("bias", torch.empty(settings.out_channels, dtype=dtype) if bias else None)

    @classmethod
    def from_stored(cls, stored: Stored, bias: Tensor | None, dtype: torch.dtype, settings: ConvSettings) -> QuantConv:
        """A convolution that holds `stored` (one matrix), with `bias` ``(out,)`` and scales in `dtype`."""
        quantize, static = _settings(stored)
        module = cls(settings, quantize, dtype, bias=bias is not None, static=static)
        module.fill_(stored)
        module.bias = copied(bias, dtype)
        return module

    @classmethod
    def empty(cls, spec: Mapping[str, Any]) -> QuantConv:
        """A convolution of that form with uninitialised buffers."""
        quantize, dtype = quantize_from_data(spec["quantize"]), named_dtype(spec["dtype"])
        return cls(ConvSettings(**spec["conv"]), quantize, dtype, bias=spec["bias"], static=spec["static"])

    def spec(self) -> dict[str, Any]:
        """Plain data from which `empty` builds the same form."""
        return {
            "type": "quant_conv",
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
        if self.quantize.act_bits:
            x = self.settings.round_input(x, self.input_scale)
        return self.settings.run(x, self.settings.kernel(self.matrix(0, x.dtype)), self.bias)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{self.settings}, bias={self.bias is not None}"


class QuantEmbedding(QuantizedWeight):
    """An embedding table of packed integers; only the rows that are looked up become numbers.

    `multiplier` is the factor that scaled embeddings (Gemma, BART) apply to what they look up.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        quantize: Quantize,
        dtype: torch.dtype,
        *,
        padding_idx: int | None = None,
        multiplier: float = 1.0,
    ) -> None:
        if quantize.act_bits:
            raise InputError("act_bits: an embedding has no activations to round; leave it out")
        super().__init__((1, num_embeddings, embedding_dim), quantize, dtype)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.multiplier = multiplier

    @classmethod
    def from_stored(
        cls, stored: Stored, dtype: torch.dtype, *, padding_idx: int | None = None, multiplier: float = 1.0
    ) -> QuantEmbedding:
        """A table that holds `stored` (one matrix)."""
        quantize, _ = _settings(stored)
        module = cls(*stored.shape[1:], quantize, dtype, padding_idx=padding_idx, multiplier=multiplier)
        module.fill_(stored)
        return module

    @classmethod
    def empty(cls, spec: Mapping[str, Any]) -> QuantEmbedding:
        """A table of that form with uninitialised buffers."""
        return cls(
            spec["num_embeddings"],
            spec["embedding_dim"],
            quantize_from_data(spec["quantize"]),
            named_dtype(spec["dtype"]),
            padding_idx=spec["padding_idx"],
            multiplier=spec["multiplier"],
        )

    def spec(self) -> dict[str, Any]:
        """Plain data from which `empty` builds the same form."""
        return {
            "type": "quant_embedding",
            "num_embeddings": self.num_embeddings,
            "embedding_dim": self.embedding_dim,
            "padding_idx": self.padding_idx,
            "multiplier": self.multiplier,
            **self._weight_spec(),
        }

    @property
    def weight(self) -> Tensor:
        """The table as a `WeightView`: reading its shape or dtype costs nothing."""
        return WeightView(self, 0)

    def forward(self, ids: Tensor) -> Tensor:
        """Rows ``(..., embedding_dim)`` for whole numbers `ids` of any shape."""
        return self.look_up(ids, self.multiplier)

    def look_up(self, ids: Tensor, multiplier: float) -> Tensor:
        """Rows `ids` of the table times `multiplier`, ``(..., embedding_dim)``."""
        flat = ids.reshape(-1)
        dense = torch.empty(flat.numel(), self.columns, dtype=self.dtype, device=self.device)
        packed = self._buffers["weight_packed"]
        assert packed is not None
        zero = None if self.weight_zero is None else self.weight_zero[flat]
        scaled_codes(unpack(packed[flat], self.quantize.bits, self.columns), self.weight_scale[flat], zero, dense)
        if multiplier != 1.0:
            dense *= multiplier
        return dense.view(*ids.shape, self.columns)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{self.num_embeddings}, {self.embedding_dim}"


def copied(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A copy of `bias` in `dtype` that shares nothing."""
    return None if bias is None else owned(bias, dtype, bias.shape)


def _settings(stored: Stored) -> tuple[Quantize, bool]:
    if stored.quantize is None or stored.codes is None or stored.shape[0] != 1:
        raise InputError(f"stored: expected the codes of one matrix, got shape {stored.shape}")
    return stored.quantize, stored.input_scale is not None
