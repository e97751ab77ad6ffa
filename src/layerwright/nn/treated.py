"""The base of the layers that hold a weight in fewer bytes: read in pieces, multiplied without keeping it dense."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from layerwright.core.errors import InputError

__all__ = [
    "DENSE_CHUNK_BYTES",
    "TreatedLinear",
    "TreatedWeight",
    "WeightView",
    "dtype_name",
    "logical_parameters",
    "named_dtype",
    "owned",
]

DENSE_CHUNK_BYTES = 64 << 20
"""Bound on the part of a weight that a product holds dense at any time (at least one row)."""

_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def named_dtype(name: str) -> torch.dtype:
    """The floating dtype of that name.

    Raises:
        InputError: no floating dtype has that name.
    """
    if name not in _DTYPES:
        raise InputError(f"dtype: got {name!r}, expected one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def owned(tensor: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """A contiguous copy in `dtype` and `shape` that shares no memory and no graph with `tensor`."""
    return tensor.detach().to(dtype).reshape(shape).clone(memory_format=torch.contiguous_format)


def logical_parameters(model: nn.Module) -> int:
    """Number of parameters that `model` computes with, whatever form they are stored in; shared ones count once.

    A packed integer weight counts by its shape: ``out * in``, at any width and group size (scales and zero points are
    the form, not parameters). A low-rank weight counts its two factors, as they take the place of the product. A
    sparse weight counts the weights that its mask keeps. These are the numbers that a ``params`` budget limits, so
    that what a plan predicts is what is counted after it.
    """
    count = sum(p.numel() for p in model.parameters())
    for module in model.modules():
        held: Any = getattr(module, "logical_parameters", None)
        count += int(held()) if held is not None else 0
    return count


class TreatedWeight(nn.Module, ABC):
    """A weight of `count` matrices ``(rows, columns)`` = ``(out, in)``, frozen, in a form smaller than dense.

    A subclass says how to read rows back; it may know a faster product. Products are differentiable in their input,
    not in the weight; the backward pass reads the weight again instead of keeping it.
    """

    def __init__(self, shape: tuple[int, int, int], *, stacked: bool = False) -> None:
        super().__init__()
        self.count, self.rows, self.columns = shape
        self.stacked = stacked

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype that the weight is computed with."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the weight is."""

    @abstractmethod
    def read_rows(self, part: int, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows ``start:stop`` of matrix `part`, dense ``(stop - start, columns)`` in `dtype`."""

    @abstractmethod
    def spec(self) -> dict[str, Any]:
        """Plain data from which `layerwright.nn.replace.module_from_spec` builds an empty module of the same form."""

    def logical_parameters(self) -> int:
        """Parameters that this module's own buffers stand for: those it holds in submodules or as ``nn.Parameter``
        are counted there.
        """
        bias = self._buffers.get("bias")
        return self.count * self.rows * self.columns + (0 if bias is None else bias.numel())

    def forget(self) -> None:
        """Drop whatever was derived from the stored tensors; called when they move, change dtype or are loaded."""

    def matrix(self, part: int = 0, dtype: torch.dtype | None = None) -> Tensor:
        """Matrix `part`, dense ``(rows, columns)``."""
        return self.read_rows(part, 0, self.rows, dtype or self.dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight: ``(out, in)``, for a stack ``(count, out, in)``."""
        if not self.stacked:
            return self.matrix(0, dtype)
        return torch.stack([self.matrix(part, dtype) for part in range(self.count)])

    def linear(self, x: Tensor, bias: Tensor | None = None, part: int = 0) -> Tensor:
        """``x @ W.T + bias`` for `x` ``(..., in)`` and matrix `part`, in the dtype of `x`.

        Raises:
            InputError: the last dimension of `x` is not the weight's input.
        """
        if x.shape[-1] != self.columns:
            raise InputError(f"x: got shape {tuple(x.shape)}, expected (..., {self.columns})")
        if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        flat = x.reshape(-1, self.columns)
        if x.requires_grad and torch.is_grad_enabled():
            y: Tensor = _FrozenLinear.apply(flat, self, bias, part)  # type: ignore[no-untyped-call]
        else:
            y = self.multiply(flat, bias, part)
        return y.reshape(*x.shape[:-1], self.rows)

    def multiply(self, x: Tensor, bias: Tensor | None, part: int) -> Tensor:
        """``x @ W.T + bias`` for `x` ``(M, columns)``: the fastest way this form knows, without derivative.

        This one reads `DENSE_CHUNK_BYTES` of the weight at a time and costs that much memory besides its result.
        """
        bias = None if bias is None else bias.to(x.dtype)
        step = self._chunk_rows(x.dtype)
        if step >= self.rows:
            return F.linear(x, self.read_rows(part, 0, self.rows, x.dtype), bias)
        y = x.new_empty(x.shape[0], self.rows)
        for start in range(0, self.rows, step):
            stop = min(start + step, self.rows)
            chunk = self.read_rows(part, start, stop, x.dtype)
            y[:, start:stop] = F.linear(x, chunk, None if bias is None else bias[start:stop])
        return y

    def multiply_back(self, gradient: Tensor, part: int) -> Tensor:
        """``gradient @ W`` for `gradient` ``(M, rows)``: the derivative of `multiply` in its input."""
        step = self._chunk_rows(gradient.dtype)
        if step >= self.rows:
            return gradient @ self.read_rows(part, 0, self.rows, gradient.dtype)
        total = gradient.new_zeros(
            gradient.shape[0], self.columns, dtype=torch.promote_types(gradient.dtype, torch.float32)
        )
        for start in range(0, self.rows, step):
            stop = min(start + step, self.rows)
            total += gradient[:, start:stop] @ self.read_rows(part, start, stop, gradient.dtype)
        return total.to(gradient.dtype)

    def _chunk_rows(self, dtype: torch.dtype) -> int:
        return max(1, DENSE_CHUNK_BYTES // max(1, self.columns * dtype.itemsize))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self.forget()
        return super()._apply(fn, recurse)  # type: ignore[no-any-return, no-untyped-call]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.forget()


class TreatedLinear(TreatedWeight):
    """A linear layer over a treated weight. It replaces ``nn.Linear`` and GPT-2's ``Conv1D`` (the same product)."""

    bias: Tensor | None

    @property
    def in_features(self) -> int:
        """Size of the input."""
        return self.columns

    @property
    def out_features(self) -> int:
        """Size of the output."""
        return self.rows

    @property
    def weight(self) -> Tensor:
        """The weight ``(out, in)`` as a `WeightView`: reading its shape or dtype costs nothing."""
        return WeightView(self, 0)

    def forward(self, x: Tensor) -> Tensor:
        """``x @ W.T + bias``: `x` is ``(..., in_features)`` in any floating dtype, which the result keeps."""
        return self.linear(x, self.bias)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class _FrozenLinear(torch.autograd.Function):
    """A product whose backward pass reads the weight again, so that training on top keeps no dense weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: TreatedWeight, bias: Tensor | None, part: int) -> Tensor:
        ctx.weight, ctx.part = weight, part
        return weight.multiply(x, bias, part)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.weight.multiply_back(gradients[0], ctx.part), None, None, None


class WeightView(Tensor):
    """One matrix of a treated weight that looks like a tensor and becomes dense only where it must.

    Shape, dtype and device are free. ``F.linear(x, view)`` and ``x @ view`` (of a transposed view) take the treated
    weight's own product. Every other operation reads the dense matrix, for the time of that operation.
    """

    source: TreatedWeight
    part: int
    transposed: bool

    @staticmethod
    def __new__(cls, source: TreatedWeight, part: int, transposed: bool = False) -> WeightView:
        """A tensor without storage."""
        shape = (source.columns, source.rows) if transposed else (source.rows, source.columns)
        view: WeightView = Tensor._make_wrapper_subclass(cls, shape, dtype=source.dtype, device=source.device)
        view.source, view.part, view.transposed = source, part, transposed
        return view

    def __init__(self, source: TreatedWeight, part: int, transposed: bool = False) -> None:
        super().__init__()

    def dense(self) -> Tensor:
        """The matrix as a plain tensor."""
        matrix = self.source.matrix(self.part)
        return matrix.t().contiguous() if self.transposed else matrix

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"WeightView({tuple(self.shape)}, {self.dtype}, of {type(self.source).__name__})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.dense().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.dense()

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            x, weight, bias = _linear_arguments(*args, **kwargs)
            if isinstance(weight, WeightView) and not weight.transposed and type(x) is not WeightView:
                return weight.source.linear(x, bias, weight.part)
        if func in _MATMULS and len(args) == 2 and not kwargs:
            x, weight = args
            if isinstance(weight, WeightView) and weight.transposed and type(x) is not WeightView:
                return weight.source.linear(x, None, weight.part)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map(_dense, (args, kwargs or {}))
        return func(*args, **kwargs)


_MATMULS = {torch.matmul, Tensor.matmul, Tensor.__matmul__}


def _linear_arguments(
    input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    return input, weight, bias


def _dense(value: Any) -> Any:
    return value.dense() if isinstance(value, WeightView) else value
