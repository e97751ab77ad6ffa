"""A low-rank adapter around any linear layer, packed ones included."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwright.core.errors import InputError
from layerwright.nn.treated import TreatedLinear, dtype_name, named_dtype, owned

__all__ = ["LoraLinear"]


class LoraLinear(nn.Module):
    """``y = base(x) + scaling * (x @ A.T) @ B.T`` with `base` frozen (Hu et al., 2021, arXiv 2106.09685).

    `A` ``(rank, in)`` is drawn as `nn.Linear` draws its weight, `B` ``(out, rank)`` is zero: a new adapter changes
    nothing. Both are float32 and the product is computed in float32, whatever the dtype of the base.

    Args:
        base: a linear layer, GPT-2's ``Conv1D``, or a layer with a treated weight (`QuantLinear`, ...).
        rank: inner dimension, at least 1.
        alpha: ``scaling = alpha / rank``.
        generator: draws `A`.

    Raises:
        InputError: no linear layer, or a rank below 1.
    """

    def __init__(
        self, base: nn.Module, rank: int = 8, alpha: float = 16.0, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        sides = linear_sides(base)
        if sides is None:
            raise InputError(f"base: got {type(base).__name__}, expected a linear layer")
        if rank < 1:
            raise InputError(f"rank: got {rank}, expected at least 1")
        self.base = base
        self.rank, self.alpha = rank, float(alpha)
        device = next((t.device for t in (*base.parameters(), *base.buffers())), torch.device("cpu"))
        self.lora_A = nn.Parameter(torch.empty(rank, sides[1], device=device))
        self.lora_B = nn.Parameter(torch.zeros(sides[0], rank, device=device))
        if device.type != "meta":
            bound = 1 / math.sqrt(sides[1])
            with torch.no_grad():
                self.lora_A.uniform_(-bound, bound, generator=generator)

    @property
    def in_features(self) -> int:
        """Size of the input."""
        return int(self.lora_A.shape[1])

    @property
    def out_features(self) -> int:
        """Size of the output."""
        return int(self.lora_B.shape[0])

    @property
    def scaling(self) -> float:
        """Factor of the adapter's product."""
        return self.alpha / self.rank

    def forward(self, x: Tensor) -> Tensor:
        """`x` ``(..., in)`` to ``(..., out)``, in the base's output dtype."""
        y: Tensor = self.base(x)
        change = F.linear(F.linear(x.to(self.lora_A.dtype), self.lora_A), self.lora_B)
        return y + (self.scaling * change).to(y.dtype)

    def delta(self) -> Tensor:
        """What the adapter adds to the weight, ``(out, in)``."""
        return self.scaling * (self.lora_B.detach() @ self.lora_A.detach())

    def merged(self, *, dequantize: bool = False) -> nn.Module:
        """A plain layer that computes the same without an adapter; the base and its tensors stay as they are.

        Raises:
            InputError: the base holds a packed weight, which cannot take up the change, and not `dequantize`.
        """
        base = self.base
        if isinstance(base, TreatedLinear):
            if not dequantize:
                raise InputError(
                    f"merge: {type(base).__name__} holds a packed weight that cannot take up an adapter: keep the adapter "
                    "(merge=False), or make the weight dense (dequantize=True)"
                )
            weight = base.dequantize(torch.float32) + self.delta()
            return _dense(weight, base.bias, base.dtype)
        weight_now = base.weight
        assert isinstance(weight_now, Tensor)
        if isinstance(base, nn.Linear):
            bias = base.bias if isinstance(base.bias, Tensor) else None
            return _dense(weight_now.float() + self.delta(), bias, weight_now.dtype)
        new = type(base)(base.nf, base.nx)  # Conv1D: the weight is (in, out)
        with torch.no_grad():
            new.weight = nn.Parameter((weight_now.float() + self.delta().t()).to(weight_now.dtype))
            assert isinstance(base.bias, Tensor)
            new.bias = nn.Parameter(base.bias.detach().clone())
        return new

    def spec(self) -> dict[str, Any]:
        """Plain data from which `empty` builds the same form."""
        return {"type": "lora_linear", "rank": self.rank, "alpha": self.alpha, "base": base_spec(self.base)}

    @classmethod
    def empty(cls, spec: Mapping[str, Any]) -> LoraLinear:
        """A layer of that form with uninitialised weights, for a state dict to fill."""
        return cls(base_from_spec(spec["base"]), spec["rank"], spec["alpha"])

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"rank={self.rank}, alpha={self.alpha:g}"


def linear_sides(module: nn.Module) -> tuple[int, int] | None:
    """``(out, in)`` of a linear layer of any kind, None for other modules."""
    if isinstance(module, nn.Linear | TreatedLinear):
        return module.out_features, module.in_features
    if type(module).__name__ == "Conv1D" and isinstance(getattr(module, "nf", None), int):
        weight = module.weight
        assert isinstance(weight, Tensor)
        return int(weight.shape[1]), int(weight.shape[0])
    return None


def _dense(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.to(dtype))
    if bias is not None:
        layer.bias = nn.Parameter(owned(bias, bias.dtype, bias.shape))
    return layer


def base_spec(base: nn.Module) -> dict[str, Any]:
    """Plain data of the layer inside an adapter, from which `base_from_spec` builds the same form."""
    if isinstance(base, TreatedLinear):
        return base.spec()
    sides = linear_sides(base)
    assert sides is not None
    weight = base.weight
    assert isinstance(weight, Tensor)
    kind = "linear" if isinstance(base, nn.Linear) else "conv1d"
    found: dict[str, Any] = {"type": kind, "bias": base.bias is not None, "dtype": dtype_name(weight.dtype)}
    return found | {"in_features": sides[1], "out_features": sides[0]}


def base_from_spec(spec: Mapping[str, Any]) -> nn.Module:
    """An empty layer of the form that `base_spec` describes."""
    from layerwright.nn.replace import module_from_spec

    if spec["type"] == "linear":
        dtype = named_dtype(spec["dtype"])
        return nn.Linear(spec["in_features"], spec["out_features"], bias=spec["bias"], dtype=dtype)
    if spec["type"] == "conv1d":
        from transformers.pytorch_utils import Conv1D

        module: nn.Module = Conv1D(spec["out_features"], spec["in_features"]).to(named_dtype(spec["dtype"]))
        return module
    return module_from_spec(spec)
