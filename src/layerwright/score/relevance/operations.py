"""Which rule hands relevance back through which torch function."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from layerwright.score.relevance.record import Operation, tensors_in
from layerwright.score.relevance.rules import (
    lrp_add,
    lrp_conv,
    lrp_linear,
    lrp_matmul,
    lrp_multiply,
    lrp_pixels,
    lrp_proportional,
)

__all__ = ["Settings", "hand_back"]

PASSING = {
    "relu", "relu6", "gelu", "silu", "elu", "leaky_relu", "hardswish", "mish", "tanh", "sigmoid", "softmax", "softplus",
    "layer_norm", "batch_norm", "group_norm", "instance_norm", "rms_norm", "normalize", "dropout", "alpha_dropout",
    "feature_dropout", "to", "float", "double", "half", "bfloat16", "type", "type_as", "contiguous", "clone", "detach",
    "cpu", "cuda", "neg", "positive",
}  # fmt: skip
"""Elementwise functions, normalisations and changes of dtype: relevance passes as it is."""

MOVING = {
    "get", "getitem", "view", "view_as", "reshape", "reshape_as", "permute", "transpose", "t", "swapaxes", "swapdims",
    "roll", "flip", "flatten", "unflatten", "unsqueeze", "squeeze", "expand", "expand_as", "broadcast_to", "repeat",
    "repeat_interleave", "tile", "chunk", "split", "split_with_sizes", "tensor_split", "unbind", "select", "narrow",
    "index_select", "gather", "take_along_dim", "movedim", "moveaxis", "cat", "concat", "concatenate", "stack", "pad",
    "constant_pad_nd", "masked_fill", "where", "unfold", "fold", "pixel_shuffle", "pixel_unshuffle", "max_pool1d",
    "max_pool2d", "amax", "setitem",
}  # fmt: skip
"""Each value of the output is one of the input's: relevance goes back to where the value came from."""

AVERAGING = {
    "mean", "sum", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "interpolate", "cumsum",
}  # fmt: skip
"""Sums of one input: in proportion to what each value adds."""


class Settings:
    """How the rules are run.

    Args:
        alpha: of the alpha-beta rule.
        eps: of divisions.
        pixels: range of the input for the z^B rule at the layer that reads it; None uses the alpha-beta rule there.
    """

    def __init__(self, alpha: float, eps: float, pixels: tuple[float, float] | None) -> None:
        self.alpha, self.eps, self.pixels = alpha, eps, pixels


def hand_back(operation: Operation, relevances: list[Tensor | None], settings: Settings) -> list[tuple[int, Tensor]]:
    """Relevance of each input that depends on the model's, as ``(number, relevance)``.

    Args:
        operation: the call.
        relevances: of its outputs, None where nothing came back.
        settings: of the rules.

    Raises:
        TypeError: a function without a rule; names the module.
    """
    first = relevances[0]
    name, inputs = operation.name, operation.inputs
    number, x = inputs[0]
    x = _wide(x)
    if len(inputs) == 2 and first is not None and name in _PAIRS:
        left, right = _wide(inputs[0][1]), _wide(inputs[1][1])
        if name == "div":
            return [(number, first)]  # a divisor normalises
        a, b = _PAIRS[name](left, right, first, settings)
        return [(number, a), (inputs[1][0], b)]
    if len(inputs) == 1 and first is not None:
        if name in _WEIGHTED:
            return [(number, _WEIGHTED[name](operation, x, first, settings))]
        if name in _PAIRS and name != "matmul" and name != "bmm":  # the other term or factor is constant
            return [(number, first.sum_to_size(x.shape))]
        if name in AVERAGING:
            return [(number, lrp_proportional(partial(_call, operation), x, first, eps=settings.eps))]
        if name in PASSING and first.shape == x.shape:
            return [(number, first)]
    if name in MOVING:
        return _move(operation, relevances)
    raise TypeError(
        f"{operation.module or 'the model'}: relevance cannot pass through {operation.name} of {len(inputs)} computed "
        f"inputs; expected a transformer or a convolution network for images"
    )


def _linear(operation: Operation, x: Tensor, relevance: Tensor, settings: Settings) -> Tensor:
    weight = _argument(operation, 1, "weight")
    return lrp_linear(x, _wide(weight), relevance, alpha=settings.alpha, eps=settings.eps)


def _product_with_constant(operation: Operation, x: Tensor, relevance: Tensor, settings: Settings) -> Tensor:
    left, right = (_wide(t) for t in tensors_in(operation.args))
    if operation.args[0] is operation.inputs[0][1] and right.dim() == 2:
        return lrp_linear(x, right.T, relevance, alpha=settings.alpha, eps=settings.eps)
    a, b = lrp_matmul(left, right, 2 * relevance, eps=settings.eps)
    return a if operation.args[0] is operation.inputs[0][1] else b


def _addmm(operation: Operation, x: Tensor, relevance: Tensor, settings: Settings) -> Tensor:
    return lrp_linear(x, _wide(operation.args[2]).T, relevance, alpha=settings.alpha, eps=settings.eps)


def _conv(operation: Operation, x: Tensor, relevance: Tensor, settings: Settings) -> Tensor:
    weight = _wide(_argument(operation, 1, "weight"))
    names = ("stride", "padding", "dilation", "groups")
    call = {
        key: value
        for place, key in enumerate(names)
        if (value := _argument(operation, 3 + place, key, missing=None)) is not None
    }
    if settings.pixels is not None and operation.inputs[0][0] == 0:
        return lrp_pixels(x, weight, relevance, *settings.pixels, eps=settings.eps, **call)
    return lrp_conv(x, weight, relevance, alpha=settings.alpha, eps=settings.eps, **call)


def _subtract(a: Tensor, b: Tensor, relevance: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return lrp_add(a, -b, relevance, eps=eps)


_WEIGHTED: dict[str, Callable[[Operation, Tensor, Tensor, Settings], Tensor]] = {
    "linear": _linear,
    "addmm": _addmm,
    "conv1d": _conv,
    "conv2d": _conv,
    "conv3d": _conv,
    "matmul": _product_with_constant,
    "bmm": _product_with_constant,
}

_PAIRS: dict[str, Callable[[Tensor, Tensor, Tensor, Settings], tuple[Tensor, Tensor]]] = {
    "add": lambda a, b, r, s: lrp_add(a, b, r, eps=s.eps),
    "sub": lambda a, b, r, s: _subtract(a, b, r, s.eps),
    "mul": lambda a, b, r, _s: lrp_multiply(a, b, r),
    "div": lambda a, b, r, _s: (r, torch.zeros_like(b)),
    "matmul": lambda a, b, r, s: lrp_matmul(a, b, r, eps=s.eps),
    "bmm": lambda a, b, r, s: lrp_matmul(a, b, r, eps=s.eps),
}


def _move(operation: Operation, relevances: list[Tensor | None]) -> list[tuple[int, Tensor]]:
    """Through a rearrangement, by its own transposed map."""
    values = {id(t): _wide(t).requires_grad_() for _, t in operation.inputs}
    with torch.enable_grad():
        if operation.name == "setitem":
            target = values[id(operation.args[0])] * 1 if id(operation.args[0]) in values else operation.args[0].clone()
            target[operation.args[1]] = _exchange(operation.args[2], values)
            outputs = [target]
        else:
            found = operation.function(*_exchange(operation.args, values), **_exchange(operation.kwargs, values))
            outputs = [t for t in tensors_in(found) if t.is_floating_point()]
        used = [(o, r) for o, r in zip(outputs, relevances, strict=True) if r is not None and o.requires_grad]
        gradients = torch.autograd.grad(
            [o for o, _ in used], [values[id(t)] for _, t in operation.inputs], [r for _, r in used], allow_unused=True
        )
    return [(n, g) for (n, _), g in zip(operation.inputs, gradients, strict=True) if g is not None]


def _call(operation: Operation, value: Tensor) -> Tensor:
    """The operation with another input."""
    new = {id(operation.inputs[0][1]): value}
    called: Tensor = operation.function(*_exchange(operation.args, new), **_exchange(operation.kwargs, new))
    return called


def _exchange(tree: Any, new: dict[int, Tensor]) -> Any:
    if isinstance(tree, Tensor):
        return new.get(id(tree), _wide(tree) if tree.is_floating_point() else tree)
    if isinstance(tree, dict):
        return {key: _exchange(value, new) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        return type(tree)(_exchange(value, new) for value in tree)
    return tree


def _argument(operation: Operation, place: int, name: str, **missing: Any) -> Any:
    if len(operation.args) > place:
        return operation.args[place]
    if name in operation.kwargs or not missing:
        return operation.kwargs[name]
    return missing["missing"]


def _wide(x: Tensor) -> Tensor:
    """The values, in float32 at least."""
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))
