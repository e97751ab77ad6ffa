"""A linear layer of int4 weights in groups and int8 activations (Li et al., 2023, FPTQ)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerwright.core.errors import InputError
from layerwright.core.layer import to_matrices
from layerwright.core.treatment import Quantize
from layerwright.nn.activation import InputQuantizer
from layerwright.nn.attached import attached, detach_
from layerwright.nn.integer_products import FEW_TOKENS, grouped_matmul, shifted_codes
from layerwright.nn.quantized import QuantLinear
from layerwright.nn.quantized_weight import QuantizedWeight, quantize_from_data
from layerwright.nn.quantizer import dequantize, find_scale, quantize, quantize_tokens
from layerwright.nn.stored import Stored
from layerwright.nn.treated import TreatedLinear, dtype_name, named_dtype, owned

__all__ = ["W4A8Linear", "integer_layers_"]

Act = Literal["static", "dynamic"]


class W4A8Linear(TreatedLinear, QuantizedWeight):
    """``y = sum_g sx * sw[n, g] * (Xq_g . Wq_g)``: integer products inside a group, float32 between groups.

    `static` rounds the input with one scale from the calibration (`input_scale`, float32), `dynamic` with one for each
    token as it comes. The weight is packed as in `QuantLinear` and becomes int8 for the time of a call; on a CPU in
    bfloat16 up to `FEW_TOKENS` input rows take PyTorch's product of packed weights with the same rounded input. On other
    devices the rounded values are multiplied. With groups the product of integers is exact but no faster than a dense
    one on a CPU; with one scale for each row (`group_size` -1) it is a single product.
    """

    input_scale: Tensor | None

    def __init__(
        self, in_features: int, out_features: int, quantize: Quantize, dtype: torch.dtype, *, act: Act, bias: bool
    ) -> None:
        if quantize.act_bits or act not in ("static", "dynamic"):
            raise InputError(f"act: got {act!r} and act_bits {quantize.act_bits}; expected static or dynamic, and none")
        super().__init__((1, out_features, in_features), quantize, dtype)
        self.act: Act = act
        self.input_scale = torch.ones((), dtype=torch.float32) if act == "static" else None
        self.register_buffer("bias", torch.empty(out_features, dtype=dtype) if bias else None)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        *,
        bits: int = 4,
        group_size: int = 128,
        input_scale: Tensor | float | None = None,
        name: str = "layer",
    ) -> W4A8Linear:
        """Round the weight of `linear` (``nn.Linear``, or GPT-2's ``Conv1D``) to nearest; a scale makes it static.

        Raises:
            InputError: a group size that does not divide the inputs; names the layer.
            TypeError: anything else, such as a layer that is quantized already.
        """
        conv1d = type(linear).__name__ == "Conv1D"
        weight = getattr(linear, "weight", None)
        if not (isinstance(linear, nn.Linear) or conv1d) or not isinstance(weight, nn.Parameter):
            raise TypeError(f"{name}: got a {type(linear).__name__}, expected an nn.Linear that is not quantized yet")
        matrix = to_matrices(weight.detach(), "conv1d" if conv1d else "linear")
        settings = Quantize(bits, group_size, method="rtn")
        if group_size != -1 and matrix.shape[-1] % group_size:
            raise InputError(
                f"{name}: group_size {group_size} does not divide its {matrix.shape[-1]} inputs; use a divisor or -1"
            )
        scale, _ = find_scale(matrix, bits, group_size, scale_dtype=weight.dtype)
        codes = quantize(matrix, scale, None, bits)
        shape = (1, matrix.shape[1], matrix.shape[2])
        act_scale = None if input_scale is None else torch.as_tensor(input_scale, dtype=torch.float32)
        stored = Stored(shape, codes=codes, scale=scale, quantize=settings)
        bias = getattr(linear, "bias", None)
        return cls._of(stored, bias, weight.dtype, act_scale).to(weight.device).train(linear.training)

    @classmethod
    def from_parts(cls, linear: QuantLinear, act: InputQuantizer) -> W4A8Linear:
        """The same numbers as `linear` with `act` beside it, as one layer of integer products.

        Raises:
            InputError: activations that are not 8 bits, symmetric, and of one scale for the tensor or for each token.
        """
        q = act.quantizer
        if q.bits != 8 or q.kind != "uniform" or not q.symmetric or q.share == "channel" or linear.quantize.bits == 8:
            raise InputError(f"integer products need symmetric 8-bit activations and fewer weight bits, got {q}")
        shape = (1, linear.rows, linear.columns)
        codes = linear.codes(0, 0, linear.rows).unsqueeze(0)
        scale, zero = linear.weight_scale.unsqueeze(0), linear.weight_zero
        stored = Stored(
            shape, codes=codes, scale=scale, zero=None if zero is None else zero[None], quantize=linear.quantize
        )
        act_scale = None if q.scale is None else q.scale
        return cls._of(stored, linear.bias, linear.dtype, act_scale).to(linear.device).train(linear.training)

    @classmethod
    def _of(cls, stored: Stored, bias: Tensor | None, dtype: torch.dtype, scale: Tensor | None) -> W4A8Linear:
        assert stored.quantize is not None
        act: Act = "dynamic" if scale is None else "static"
        module = cls(stored.shape[2], stored.shape[1], stored.quantize, dtype, act=act, bias=bias is not None)
        module.fill_(stored)
        if scale is not None:
            module.input_scale = owned(scale, torch.float32, ())
        if bias is not None:
            module.bias = owned(bias, dtype, bias.shape)
        return module

    @classmethod
    def empty(cls, spec: Mapping[str, Any]) -> W4A8Linear:
        """A layer of that form with uninitialised buffers, for a state dict to fill."""
        settings, dtype = quantize_from_data(spec["quantize"]), named_dtype(spec["dtype"])
        return cls(spec["in_features"], spec["out_features"], settings, dtype, act=spec["act"], bias=spec["bias"])

    def spec(self) -> dict[str, Any]:
        """Plain data from which `empty` builds the same form."""
        weight = {key: value for key, value in self._weight_spec().items() if key != "static"}
        return {
            "type": "w4a8_linear",
            "in_features": self.in_features,
            "out_features": self.out_features,
            "act": self.act,
            "bias": self.bias is not None,
            **weight,
            "dtype": dtype_name(self.dtype),
        }

    def linear(self, x: Tensor, bias: Tensor | None = None, part: int = 0) -> Tensor:
        """As `TreatedWeight.linear`; no gradient where a static range clamps."""
        if self.input_scale is not None and x.requires_grad:
            scale = float(self.input_scale)
            x = x.clamp(-128 * scale, 127 * scale)
        return TreatedLinear.linear(self, x, bias, part)

    def multiply(self, x: Tensor, bias: Tensor | None, part: int) -> Tensor:
        """``x @ W.T + bias`` for `x` ``(M, in)``, by integers; see the class."""
        codes, scale = self._round(x)
        if x.device.type != "cpu" or (x.dtype == torch.bfloat16 and len(x) <= FEW_TOKENS):
            return super().multiply(dequantize(codes, scale, None, x.dtype), bias, part)
        weight = shifted_codes(self.codes(part, 0, self.rows), self.weight_zero)
        y = grouped_matmul(codes, scale, weight, self.weight_scale).to(x.dtype)
        return y if bias is None else y + bias.to(y.dtype)

    def reference(self, x: Tensor) -> Tensor:
        """What `forward` computes, from rounded values in float64: for tests."""
        flat = x.reshape(-1, self.columns)
        codes, scale = self._round(flat)
        rounded = dequantize(codes, scale.double(), None, torch.float64)
        bias = None if self.bias is None else self.bias.double()
        zero = self.weight_zero
        weight = dequantize(self.codes(0, 0, self.rows), self.weight_scale.double(), zero, torch.float64)
        return F.linear(rounded, weight, bias).reshape(*x.shape[:-1], self.rows)

    def _round(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.input_scale is None:
            return quantize_tokens(x)
        return quantize(x, self.input_scale, None, 8), self.input_scale

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        before = self.input_scale
        super()._apply(fn, recurse)
        # The range stays float32 whatever the model becomes.
        if before is not None and self.input_scale is not None and self.input_scale.dtype != torch.float32:
            device = self.input_scale.device
            self.input_scale = before.to(device) if before.device.type != "meta" else self.input_scale.float()
        return self

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{super().extra_repr()}, {self.quantize.label()}, act={self.act}"


def integer_layers_(model: nn.Module) -> list[str]:
    """Make one `W4A8Linear` of every `QuantLinear` of fewer than 8 bits whose input is rounded to 8 bits beside it.

    In place; returns the paths. Layers with other activations stay as they are.
    """
    done = []
    for path, module in list(model.named_modules()):
        child = attached(module, InputQuantizer.child) if isinstance(module, QuantLinear) else None
        if not isinstance(module, QuantLinear) or not isinstance(child, InputQuantizer):
            continue
        q = child.quantizer
        if q.bits == 8 and q.kind == "uniform" and q.symmetric and q.share != "channel" and module.quantize.bits < 8:
            new = W4A8Linear.from_parts(module, child)
            detach_(module, InputQuantizer.child)
            owner, _, name = path.rpartition(".")
            setattr(model.get_submodule(owner), name, new)
            done.append(path)
    return done
