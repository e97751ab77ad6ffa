"""Forms in which the engine holds a matrix, and their products with few or many rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from layerwright.core.errors import InputError, unknown_name
from layerwright.nn.kernels import Int4Weight, Int8Weight

__all__ = [
    "DenseProduct",
    "JoinedProduct",
    "KernelProduct",
    "Layout",
    "ModuleProduct",
    "PackedProduct",
    "Product",
    "PromptWeights",
    "dense",
]

Layout = Literal["auto", "packed", "plain"]
PromptWeights = Literal["codes", "dense"]
_LAID_OUT_FOR = 8
"""Rows for which oneDNN lays a packed weight out."""
_FEW = 4
"""A product of fewer rows than this takes no less time than one of so many, where the weight outgrows the caches:
11264 x 2048 in bfloat16, one thread: 2.8 ms for 1 row, 2.2 ms for 4 (3072 x 2048: 0.67 and 0.62)."""
_OUT_OF_CACHE = 4 << 20
_SMALL = 1 << 20
"""Bytes below which a float32 weight is not packed: a call of oneDNN takes 18 us before it computes."""


class Product(ABC):
    """``x @ W.T + bias`` for a matrix ``(rows, columns)`` that never changes.

    Attributes:
        rows, columns: of the matrix: outputs and inputs.
        nbytes: memory that it holds.
    """

    rows: int
    columns: int
    nbytes: int

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """The product for `x` ``(M, columns)``, a new tensor ``(M, rows)``."""

    def into(self, x: Tensor, out: Tensor) -> None:
        """Write the product to `out` ``(M, rows)``."""
        out.copy_(self(x))

    def add_to_(self, x: Tensor, out: Tensor) -> None:
        """Add the product to `out` ``(M, rows)``, in place."""
        out.add_(self(x))


class DenseProduct(Product):
    """A dense weight; writes where it is told and allocates nothing there.

    Args:
        weight: ``(rows, columns)``; in float32 it is held transposed, which one row reads faster.
        bias: ``(rows,)`` or None.
        shared: hold `weight` itself, so that an embedding table and a head are one.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, shared: bool = False) -> None:
        self.rows, self.columns = weight.shape
        turned = weight.dtype == torch.float32 and not shared
        self.weight_t = weight.t().contiguous() if turned else weight.t()
        self.bias = bias
        self.nbytes = (0 if shared else weight.nbytes) + (0 if bias is None else bias.nbytes)

    def __call__(self, x: Tensor) -> Tensor:
        """The product, a new tensor."""
        return torch.mm(x, self.weight_t) if self.bias is None else torch.addmm(self.bias, x, self.weight_t)

    def into(self, x: Tensor, out: Tensor) -> None:
        """Write the product to `out`."""
        if self.bias is None:
            torch.mm(x, self.weight_t, out=out)
        else:
            torch.addmm(self.bias, x, self.weight_t, out=out)

    def add_to_(self, x: Tensor, out: Tensor) -> None:
        """Add the product to `out`, in place."""
        torch.addmm(out, x, self.weight_t, out=out)
        if self.bias is not None:
            out.add_(self.bias)


class PackedProduct(Product):
    """A dense weight in the blocked layout of oneDNN on a CPU, which few rows read faster.

    Each product allocates its result (``M * rows`` elements).

    Args:
        weight: ``(rows, columns)``, float32 or bfloat16.
        bias: ``(rows,)`` or None.
        expected_rows: of inputs while decoding.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, expected_rows: int = _LAID_OUT_FOR) -> None:
        self.rows, self.columns = weight.shape
        single = expected_rows == 1 and weight.dtype == torch.float32
        rows = 1 if single else _LAID_OUT_FOR
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
        self.bias = bias
        pads = not single and weight.nbytes >= _OUT_OF_CACHE
        self._padded = weight.new_zeros(_FEW, self.columns) if pads else None
        held = [weight, *(t for t in (bias, self._padded) if t is not None)]
        self.nbytes = sum(tensor.nbytes for tensor in held)

    def __call__(self, x: Tensor) -> Tensor:
        """The product, a new tensor or a part of one."""
        rows = x.shape[0]
        if self._padded is not None and rows < _FEW:
            self._padded[:rows].copy_(x)
            x = self._padded
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return y if len(y) == rows else y[:rows]


class KernelProduct(Product):
    """Integer codes in the processor's own layout; bfloat16 inputs. Many rows are taken in pieces.

    Args:
        weight: the codes.
        rows, columns: of the matrix.
        bias: ``(rows,)`` or None.
        prompts: the same matrix dense, for more than four rows; None to use the codes for any number.
    """

    def __init__(
        self,
        weight: Int4Weight | Int8Weight,
        rows: int,
        columns: int,
        bias: Tensor | None,
        prompts: Product | None = None,
    ) -> None:
        self.rows, self.columns, self.weight, self.bias, self.prompts = rows, columns, weight, bias, prompts
        self.nbytes = weight.nbytes + (0 if bias is None else bias.nbytes) + (0 if prompts is None else prompts.nbytes)

    def __call__(self, x: Tensor) -> Tensor:
        """The product, a new tensor."""
        if self.prompts is not None and x.shape[0] > _FEW:
            return self.prompts(x)
        most = self.weight.max_rows
        y = self.weight(x) if x.shape[0] <= most else torch.cat([self.weight(piece) for piece in x.split(most)])
        return y if self.bias is None else y + self.bias


class ModuleProduct(Product):
    """Whatever a module computes; the way for layers in a form that the engine does not know.

    Args:
        module: called with ``(M, columns)``.
        order: outputs in this order, None as they come.
    """

    def __init__(self, module: nn.Module, rows: int, columns: int, order: Tensor | None = None) -> None:
        self.module, self.rows, self.columns, self.order = module, rows, columns, order
        tensors = [*module.parameters(), *module.buffers()]
        self.nbytes = sum(tensor.nbytes for tensor in tensors)

    def __call__(self, x: Tensor) -> Tensor:
        """The product, a new tensor."""
        y: Tensor = self.module(x)
        return y if self.order is None else y.index_select(-1, self.order)


class JoinedProduct(Product):
    """Products of one input whose outputs stand side by side."""

    def __init__(self, parts: Sequence[Product]) -> None:
        self.parts = tuple(parts)
        self.rows, self.columns = sum(part.rows for part in parts), parts[0].columns
        self.nbytes = sum(part.nbytes for part in parts)

    def __call__(self, x: Tensor) -> Tensor:
        """The products, a new tensor."""
        return torch.cat([part(x) for part in self.parts], -1)


def dense(weight: Tensor, bias: Tensor | None, layout: Layout, expected_rows: int) -> Product:
    """A dense matrix in the layout that fits the device and the batch.

    Args:
        weight: ``(rows, columns)`` in the dtype that is computed with.
        bias: ``(rows,)`` or None.
        layout: see `compile_inference`.
        expected_rows: sequences that decode together.

    Raises:
        InputError: an unknown layout, or ``packed`` where there is no such product.
    """
    if layout not in get_args(Layout):
        raise unknown_name("layout", str(layout), get_args(Layout))
    if layout == "plain" or (layout == "auto" and not worth_packing(weight, expected_rows)):
        return DenseProduct(weight, bias)
    if not can_pack(weight):
        kind = str(weight.dtype).removeprefix("torch.")
        raise InputError(
            f"layout: 'packed' is not to be had for {kind} on this {weight.device.type}: oneDNN does not multiply it here "
            "(bfloat16 takes a CPU with AVX-512); use 'auto' or 'plain'"
        )
    return PackedProduct(weight, bias, expected_rows)


def worth_packing(weight: Tensor, expected_rows: int) -> bool:
    """Whether oneDNN multiplies such a matrix here, and faster than BLAS: not one row in float32, nor a small matrix.

    Of one row in float32 a transposed weight takes about a tenth less time; packed, prompts take a quarter less.
    """
    if not can_pack(weight):
        return False
    return weight.dtype == torch.bfloat16 or (expected_rows > 1 and weight.nbytes >= _SMALL)


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN multiplies such a matrix here in its own layout."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    half = weight.dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return half or weight.dtype == torch.float32
