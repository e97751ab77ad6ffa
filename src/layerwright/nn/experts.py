"""Experts in one three-dimensional parameter, packed: a module that stands where the parameter stood.

The models' own loop over experts asks ``self.gate_up_proj[expert]`` and multiplies with it. A stack answers with a
`layerwright.nn.treated.WeightView`, so that the product of that expert reads its codes directly.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from layerwright.core.errors import InputError
from layerwright.core.treatment import Quantize
from layerwright.nn.quantized_weight import QuantizedWeight, quantize_from_data
from layerwright.nn.sparse import sparse_arguments
from layerwright.nn.sparse_weight import SparseWeight
from layerwright.nn.stored import Stored
from layerwright.nn.treated import TreatedWeight, WeightView, dtype_name, named_dtype, owned

__all__ = ["DenseStack", "ExpertStack", "LowRankStack", "PackedStack", "SparseStack", "replace_parameter_"]


class ExpertStack(TreatedWeight):
    """What stands in for an experts parameter ``(count, out, in)``, or ``(count, in, out)`` where `transposed`.

    Indexing, ``shape``, ``dtype``, ``device`` and ``ndim`` are those of the parameter. Torch functions that are given
    the whole stack (``torch.bmm``) get it dense, for the time of the call.
    """

    transposed: bool = False

    @property
    def shape(self) -> torch.Size:
        """Shape of the parameter it stands for."""
        last = (self.columns, self.rows) if self.transposed else (self.rows, self.columns)
        return torch.Size((self.count, *last))

    @property
    def ndim(self) -> int:
        """3."""
        return 3

    def size(self, dim: int | None = None) -> Any:
        """As `torch.Tensor.size`."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """3."""
        return 3

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: Any) -> Tensor:
        """One expert's matrix, in the parameter's own orientation, for a whole number or a scalar tensor.

        Anything else that indexes the first dimension gathers the chosen experts dense.
        """
        if isinstance(index, int) or (isinstance(index, Tensor) and index.ndim == 0 and index.dtype != torch.bool):
            expert = range(self.count)[int(index)]
            return WeightView(self, expert, self.transposed)
        experts = torch.arange(self.count)[index.cpu() if isinstance(index, Tensor) else index]
        chosen, place = torch.unique(experts, return_inverse=True)
        if not len(chosen):
            return torch.empty(*experts.shape, *self.shape[1:], dtype=self.dtype, device=self.device)
        dense = torch.stack([self._oriented(int(expert)) for expert in chosen])
        return dense[place.to(dense.device)]

    def dense(self) -> Tensor:
        """The whole parameter as a plain tensor, in its own orientation."""
        return torch.stack([self._oriented(part) for part in range(self.count)])

    def _oriented(self, part: int) -> Tensor:
        return self.matrix(part).t() if self.transposed else self.matrix(part)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map(_dense, (args, dict(kwargs or {})))
        return func(*args, **kwargs)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{tuple(self.shape)}, transposed={self.transposed}"


class PackedStack(ExpertStack, QuantizedWeight):
    """Experts as packed integers; see `QuantizedWeight` for its buffers and the memory it holds."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        quantize: Quantize,
        dtype: torch.dtype,
        *,
        transposed: bool = False,
        static: bool = False,
    ) -> None:
        super().__init__(shape, quantize, dtype, static=static, stacked=True)
        self.transposed = transposed

    @classmethod
    def from_stored(cls, stored: Stored, dtype: torch.dtype, *, transposed: bool = False) -> PackedStack:
        """A stack that holds `stored` ``(count, out, in)``, with scales in `dtype`."""
        if stored.quantize is None or stored.codes is None:
            raise InputError("stored: expected codes")
        static = stored.input_scale is not None
        module = cls(stored.shape, stored.quantize, dtype, transposed=transposed, static=static)
        module.fill_(stored)
        return module

    @classmethod
    def empty(cls, spec: Mapping[str, Any]) -> PackedStack:
        """A stack of that form with uninitialised buffers."""
        quantize, dtype = quantize_from_data(spec["quantize"]), named_dtype(spec["dtype"])
        return cls(_shape(spec), quantize, dtype, transposed=spec["transposed"], static=spec["static"])

    def spec(self) -> dict[str, Any]:
        """Plain data from which `empty` builds the same form."""
        return {"type": "packed_stack", **_stack_spec(self), **self._weight_spec()}


class SparseStack(ExpertStack, SparseWeight):
    """Experts as bit masks and kept values or codes; see `SparseWeight` for its bytes and its speed."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        kept: int,
        quantize: Quantize | None,
        dtype: torch.dtype,
        *,
        transposed: bool = False,
        static: bool = False,
    ) -> None:
        super().__init__(shape, kept, quantize, dtype, static=static, stacked=True)
        self.transposed = transposed

    @classmethod
    def from_stored(cls, stored: Stored, dtype: torch.dtype, *, transposed: bool = False) -> SparseStack:
        """A stack that holds `stored` ``(count, out, in)`` with its mask."""
        kept, quantize, static = sparse_arguments(stored)
        module = cls(stored.shape, kept, quantize, dtype, transposed=transposed, static=static)
        module.fill_(stored)
        return module

    @classmethod
    def empty(cls, spec: Mapping[str, Any]) -> SparseStack:
        """A stack of that form with uninitialised buffers."""
        quantize = None if spec["quantize"] is None else quantize_from_data(spec["quantize"])
        dtype = named_dtype(spec["dtype"])
        return cls(_shape(spec), spec["kept"], quantize, dtype, transposed=spec["transposed"], static=spec["static"])

    def spec(self) -> dict[str, Any]:
        """Plain data from which `empty` builds the same form."""
        return {"type": "sparse_stack", **_stack_spec(self), **self._weight_spec()}


class DenseStack(TreatedWeight):
    """Matrices kept dense ``(count, out, in)`` as a parameter: a factor of a `LowRankStack`."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__((weight.shape[0], weight.shape[1], weight.shape[2]), stacked=True)
        self.register_parameter("values", nn.Parameter(weight))

    values: nn.Parameter

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the weight is computed with."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self.values.device

    def read_rows(self, part: int, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows ``start:stop`` of matrix `part`, dense in `dtype`."""
        return self.values[part, start:stop].to(dtype)

    def logical_parameters(self) -> int:
        """None besides its parameter."""
        return 0

    def linear(self, x: Tensor, bias: Tensor | None = None, part: int = 0) -> Tensor:
        """As `TreatedWeight.linear`, differentiable in the weight too."""
        return torch.nn.functional.linear(x, self.values[part], bias)

    def spec(self) -> dict[str, Any]:
        """Plain data from which `empty` builds the same form."""
        return {"type": "dense_stack", "shape": [self.count, self.rows, self.columns], "dtype": dtype_name(self.dtype)}


class LowRankStack(ExpertStack):
    """Experts as products of two thin stacks, each a `DenseStack` or a `PackedStack`: ``w = left @ right``."""

    def __init__(
        self, left: DenseStack | PackedStack, right: DenseStack | PackedStack, *, transposed: bool = False
    ) -> None:
        super().__init__((left.count, left.rows, right.columns), stacked=True)
        self.left, self.right, self.transposed = left, right, transposed

    @classmethod
    def from_stored(cls, stored: Stored, dtype: torch.dtype, *, transposed: bool = False) -> LowRankStack:
        """A stack that holds the factors of `stored` ``(count, out, in)``."""
        if stored.factors is None:
            raise InputError("stored: expected factors")
        left, right = (_factor(factor, dtype) for factor in stored.factors)
        return cls(left, right, transposed=transposed)

    @classmethod
    def empty(cls, spec: Mapping[str, Any]) -> LowRankStack:
        """A stack of that form with uninitialised tensors."""
        return cls(_empty_factor(spec["left"]), _empty_factor(spec["right"]), transposed=spec["transposed"])

    def spec(self) -> dict[str, Any]:
        """Plain data from which `empty` builds the same form."""
        return {
            "type": "low_rank_stack",
            "transposed": self.transposed,
            "left": self.left.spec(),
            "right": self.right.spec(),
        }

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the weight is computed with."""
        return self.left.dtype

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self.left.device

    def logical_parameters(self) -> int:
        """None besides those of its factors."""
        return 0

    def read_rows(self, part: int, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows ``start:stop`` of matrix `part`, dense in `dtype`."""
        left = self.left.read_rows(part, start, stop, torch.float32)
        return (left @ self.right.matrix(part, torch.float32)).to(dtype)

    def linear(self, x: Tensor, bias: Tensor | None = None, part: int = 0) -> Tensor:
        """As `TreatedWeight.linear`."""
        return self.left.linear(self.right.linear(x, None, part), bias, part)


def replace_parameter_(owner: nn.Module, name: str, stack: ExpertStack) -> None:
    """Put `stack` where the parameter (or an earlier stack) `name` of `owner` stands.

    Transformers models choose between a loop over experts and batched products that read the whole parameter; `owner`
    gets a configuration of its own that asks for the loop (``eager``), and the model's other parts keep theirs.

    Raises:
        InputError: no such parameter, or another shape.
    """
    old = getattr(owner, name, None)
    if old is None or tuple(old.shape) != tuple(stack.shape):
        found = "nothing" if old is None else f"shape {tuple(old.shape)}"
        raise InputError(f"{name}: found {found} in {type(owner).__name__}, expected shape {tuple(stack.shape)}")
    delattr(owner, name)
    owner.add_module(name, stack)
    config: Any = getattr(owner, "config", None)
    if hasattr(config, "_experts_implementation"):
        config = copy.deepcopy(config)
        config._experts_implementation = "eager"
        owner.config = config


def _dense(value: Any) -> Any:
    return value.dense() if isinstance(value, ExpertStack) else value


def _shape(spec: Mapping[str, Any]) -> tuple[int, int, int]:
    count, rows, columns = spec["shape"]
    return count, rows, columns


def _stack_spec(stack: ExpertStack) -> dict[str, Any]:
    return {"shape": [stack.count, stack.rows, stack.columns], "transposed": stack.transposed}


def _factor(stored: Stored, dtype: torch.dtype) -> DenseStack | PackedStack:
    if stored.codes is not None:
        return PackedStack.from_stored(stored, dtype)
    if stored.dense is None:
        raise InputError("stored: a factor is neither dense nor quantized")
    return DenseStack(owned(stored.dense, dtype, stored.shape))


def _empty_factor(spec: Mapping[str, Any]) -> DenseStack | PackedStack:
    if spec["type"] == "packed_stack":
        return PackedStack.empty(spec)
    return DenseStack(torch.empty(*_shape(spec), dtype=named_dtype(spec["dtype"])))
