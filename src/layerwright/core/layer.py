"""Layer addresses, and one view on weights however a model stores them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

__all__ = ["Kind", "LayerRef", "Layout", "get_parameter", "read_matrix", "write_matrix_"]

Kind = Literal["linear", "conv", "norm", "attention", "mlp", "block", "embedding", "experts", "head", "other"]
Layout = Literal["linear", "conv1d", "conv", "experts", "experts_transposed", "none"]


@dataclass(frozen=True)
class LayerRef:
    """A layer's address and shape.

    Attributes:
        path: qualified name, unique in the model. For a layer with a weight of its own, its module
            (``model.layers.3.mlp.down_proj``); for experts stored as one three-dimensional parameter, that parameter
            (``model.layers.3.mlp.experts.down_proj``); for a block, its module.
        kind: what it is.
        parameter: full name of its weight, ``""`` where it has none that can be treated.
        shape: the weight as matrices ``(out, in)``; a convolution's input is ``in_channels / groups * kernel``.
        count: number of such matrices (experts); 1 otherwise.
        layout: how the parameter stores them: ``linear`` (out, in); ``conv1d`` (in, out), as in GPT-2; ``conv``
            (out, in / groups, *kernel); ``experts`` (count, out, in); ``experts_transposed`` (count, in, out).
        stack: path of the list of blocks it stands in, ``""`` outside any.
        block: index in that list, None outside any.
        tied: path of the layer whose weight this one shares, ``""`` if it shares none.
        role: what it does in its block, where known (``q``, ``k``, ``v``, ``qkv``, ``o``, ``gate``, ``up``,
            ``gate_up``, ``down``), ``""`` elsewhere.
    """

    path: str
    kind: Kind
    parameter: str = ""
    shape: tuple[int, int] = (0, 0)
    count: int = 1
    layout: Layout = "none"
    stack: str = ""
    block: int | None = None
    tied: str = ""
    role: str = ""

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.count * self.shape[0] * self.shape[1]


def get_parameter(model: nn.Module, name: str) -> Tensor:
    """The parameter (or buffer) of that full name."""
    owner, _, attribute = name.rpartition(".")
    value = getattr(model.get_submodule(owner) if owner else model, attribute)
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}, expected a tensor")
    return value


def to_matrices(parameter: Tensor, layout: Layout) -> Tensor:
    """View `parameter` as ``(count, out, in)``."""
    if layout == "linear":
        return parameter.unsqueeze(0)
    if layout == "conv1d":
        return parameter.t().unsqueeze(0)
    if layout == "conv":
        return parameter.reshape(1, parameter.shape[0], -1)
    if layout == "experts":
        return parameter
    if layout == "experts_transposed":
        return parameter.transpose(1, 2)
    raise ValueError(f"layout: {layout!r} has no matrices")


def from_matrices(matrices: Tensor, layout: Layout, shape: torch.Size) -> Tensor:
    """The inverse of `to_matrices`: a tensor of `shape`, the parameter's own."""
    if layout == "conv1d":
        return matrices[0].t().reshape(shape)
    if layout == "experts_transposed":
        return matrices.transpose(1, 2).reshape(shape)
    return matrices.reshape(shape)


def read_matrix(model: nn.Module, ref: LayerRef) -> Tensor:
    """The weight of `ref` as ``(count, out, in)``: a view where the layout allows it."""
    return to_matrices(get_parameter(model, ref.parameter).detach(), ref.layout)


@torch.no_grad()
def write_matrix_(model: nn.Module, ref: LayerRef, matrices: Tensor) -> None:
    """Write ``(count, out, in)`` back into the weight of `ref`, in place, in the parameter's own dtype."""
    parameter = get_parameter(model, ref.parameter)
    parameter.copy_(from_matrices(matrices, ref.layout, parameter.shape))
