"""A linear layer whose size is not the one that the model's configuration states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from layerwright.nn.treated import dtype_name, named_dtype, owned

__all__ = ["ResizedLinear"]


class ResizedLinear(nn.Linear):
    """An ``nn.Linear`` that is saved with its size, so that a model with layers of unequal widths loads back."""

    @classmethod
    def from_weight(cls, weight: Tensor, bias: Tensor | None) -> Self:
        """A layer that owns copies of `weight` ``(out, in)`` and `bias` ``(out,)``."""
        out, in_ = weight.shape
        layer = cls(in_, out, bias=bias is not None, device="meta", dtype=weight.dtype)
        layer.weight = nn.Parameter(owned(weight.detach(), weight.dtype, weight.shape), weight.requires_grad)
        if bias is not None:
            layer.bias = nn.Parameter(owned(bias.detach(), bias.dtype, bias.shape), bias.requires_grad)
        return layer

    def spec(self) -> dict[str, Any]:
        """Plain data from which `empty` builds the same form."""
        return {
            "type": "resized_linear",
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias is not None,
            "dtype": dtype_name(self.weight.dtype),
        }

    @classmethod
    def empty(cls, spec: Mapping[str, Any]) -> Self:
        """A layer of that form with uninitialised tensors."""
        dtype: torch.dtype = named_dtype(spec["dtype"])
        return cls(spec["in_features"], spec["out_features"], bias=spec["bias"], dtype=dtype)
