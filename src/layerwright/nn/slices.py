"""Parts of a linear layer: views of its leading or adjoining rows and columns, copies of chosen ones."""

from __future__ import annotations

from typing import TypeAlias

from torch import Tensor, nn

from layerwright.core.errors import InputError

__all__ = ["Part", "linear_weight", "slice_linear"]

Part: TypeAlias = "int | slice | Tensor | None"
"""Which rows or columns: the first so many, a slice, indices, or None for all."""


def linear_weight(layer: nn.Module) -> Tensor:
    """The weight ``(out, in)`` of a linear layer or of GPT-2's ``Conv1D``, a view.

    Raises:
        TypeError: another kind of layer.
    """
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise TypeError(f"layer: got {type(layer).__name__}, expected a linear layer with a weight (out, in)")
    return weight.t() if type(layer).__name__ == "Conv1D" else weight


def slice_linear(layer: nn.Module, rows: Part = None, columns: Part = None) -> tuple[Tensor, Tensor | None]:
    """Weight ``(rows, columns)`` and bias ``(rows,)`` of a part of a linear layer.

    Numbers and slices give views, so that what is computed with them sends its gradient to these entries alone and the
    others' is exactly zero. Indices give copies (differentiable ones).

    Args:
        layer: ``nn.Linear`` or ``Conv1D``.
        rows: of the output features.
        columns: of the input features.

    Raises:
        InputError: a number outside 0 to the layer's size.
    """
    weight = _part(_part(linear_weight(layer), rows, 0, "rows"), columns, 1, "columns")
    bias = getattr(layer, "bias", None)
    return weight, None if bias is None else _part(bias, rows, 0, "rows")


def _part(tensor: Tensor, part: Part, dim: int, name: str) -> Tensor:
    if part is None:
        return tensor
    if isinstance(part, Tensor):
        return tensor.index_select(dim, part.to(tensor.device))
    if isinstance(part, int):
        if isinstance(part, bool) or not 0 <= part <= tensor.shape[dim]:
            raise InputError(f"{name}: got {part}, expected 0 to {tensor.shape[dim]}")
        return tensor.narrow(dim, 0, part)
    start, stop, step = part.indices(tensor.shape[dim])
    if step != 1:
        raise InputError(f"{name}: got a step of {step}, expected adjoining ones")
    return tensor.narrow(dim, start, max(0, stop - start))
