"""Experts that a model stores as three-dimensional parameters: which way round they stand."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn

from layerwright.core.layer import Layout

__all__: list[str] = []

_DOWN = re.compile(r"down|w2|output")
_UP = re.compile(r"up|gate|w1|w3|input")
_WIDTHS = ("hidden_size", "hidden_dim", "d_model", "n_embd", "input_dim")
_IN_OUT = (("in_features", "out_features"), ("input_size", "output_size"), ("group_in_dim", "group_out_dim"))


def experts_layout(module: nn.Module) -> Mapping[str, Layout]:
    """Names of the expert parameters that `module` itself holds, and their common layout.

    In order of strength: a fused gate and up twice as wide as the down projection is deep (only one orientation
    allows it); the module's own word (`is_transposed`); the length of the biases; the width of the hidden states
    that the module states. Parameters whose orientation stays open are left out: they cannot be treated.
    """
    stacks = {name: p for name, p in module._parameters.items() if p is not None and p.dim() == 3 and p.shape[0] > 1}
    if len({p.shape[0] for p in stacks.values()}) != 1:
        return {}
    transposed = _transposed(module, stacks)
    if transposed is None:
        return {}
    layout: Layout = "experts_transposed" if transposed else "experts"
    return dict.fromkeys(stacks, layout)


def _transposed(module: nn.Module, stacks: Mapping[str, Tensor]) -> bool | None:
    answer = _by_gate(list(stacks.values()))
    if answer is not None:
        return answer
    stated = getattr(module, "is_transposed", None)
    if isinstance(stated, bool):
        return stated
    for answer in (_by_bias(module, stacks), _by_sizes(module, stacks), _by_width(module, stacks)):
        if answer is not None:
            return answer
    return None


def _by_gate(parameters: list[Tensor]) -> bool | None:
    """``(2 inner, hidden)`` with ``(hidden, inner)``, or ``(hidden, 2 inner)`` with ``(inner, hidden)``."""
    for both in parameters:
        for down in parameters:
            (_, a, b), (_, c, d) = both.shape, down.shape
            if a == 2 * d and b == c:
                return False
            if b == 2 * c and a == d:
                return True
    return None


def _by_bias(module: nn.Module, stacks: Mapping[str, Tensor]) -> bool | None:
    """A bias has one entry for each output."""
    for name, p in stacks.items():
        bias = module._parameters.get(f"{name}_bias")
        if bias is not None and bias.shape[-1] in p.shape[1:] and p.shape[1] != p.shape[2]:
            return bool(bias.shape[-1] == p.shape[2])
    return None


def _by_sizes(module: nn.Module, stacks: Mapping[str, Tensor]) -> bool | None:
    """The module states its input and its output size."""
    for before, after in _IN_OUT:
        sizes = (getattr(module, before, None), getattr(module, after, None))
        for p in stacks.values():
            if p.shape[1] != p.shape[2] and set(sizes) == set(p.shape[1:]):
                return tuple(p.shape[1:]) == sizes
    return None


def _by_width(module: nn.Module, stacks: Mapping[str, Tensor]) -> bool | None:
    """Down projections end, and the others begin, at the width of the hidden states."""
    widths = {getattr(source, name, None) for source in (module, getattr(module, "config", None)) for name in _WIDTHS}
    for name, p in stacks.items():
        if p.shape[1] == p.shape[2] or len(widths.intersection(p.shape[1:])) != 1:
            continue
        last = p.shape[2] in widths
        if _DOWN.search(name):
            return last
        if _UP.search(name):
            return not last
    return None
