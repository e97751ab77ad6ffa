"""Train a network with convolutions first, turn them into attention over patches, and train on (two-phase training)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import nn

from layerwright.core.errors import InputError, unknown_name
from layerwright.nn.conv_as_attention import conv_to_attention
from layerwright.nn.patches import PatchConv

__all__ = ["two_phase"]

M = TypeVar("M", bound=nn.Module)
Fit = Callable[[nn.Module], object]
"""Trains a model in place; what it returns is not used."""


def two_phase(
    model: M,
    phase1_fit: Fit,
    phase2_fit: Fit,
    convert: Callable[[nn.Module], nn.Module] | None = None,
    *,
    sharpness: float = 6.0,
    names: str | Sequence[str] | None = None,
) -> M:
    """A copy of `model`, trained with its convolutions, then with attention that starts as these convolutions.

    The second phase begins where the first one ends, up to how sharply the heads look at their patches: at sharpness 6
    a head gives up to ``(n - 1) exp(-6)`` to the other ``n - 1`` patches, and its biases can still learn.

    Source: Li et al., "Can Vision Transformers Perform Convolution?" (2021, arXiv 2111.01353).

    Args:
        model: left untouched.
        phase1_fit, phase2_fit: train the model they are given, in place; parameters differ between the two.
        convert: the module that takes the place of another, called in the same way; makes attention with content of a
            `PatchConv` if left out.
        sharpness: of the heads that are made where `convert` is left out, above 0.
        names: paths of what is converted; every `PatchConv` if left out.

    Raises:
        InputError: nothing to convert, no such module, or a convolution that attention cannot be.
        TypeError: `names` without `convert` that are no `PatchConv`.
    """
    modules = dict(model.named_modules())
    marked = [name for name, module in modules.items() if isinstance(module, PatchConv)]
    chosen = marked if names is None else [names] if isinstance(names, str) else list(names)
    if not chosen:
        raise InputError(f"model: {type(model).__name__} has no PatchConv to convert; give names and convert")
    for name in chosen:
        if name not in modules or not name:
            raise unknown_name("module", name, [known for known in modules if known])
        if convert is None and not isinstance(modules[name], PatchConv):
            raise TypeError(
                f"names: {name} is {type(modules[name]).__name__}, expected PatchConv; give convert for others"
            )

    def attention_of(module: nn.Module) -> nn.Module:
        assert isinstance(module, PatchConv)
        return conv_to_attention(module.conv, module.patch, sharpness=sharpness, content=True)

    make = convert or attention_of
    if convert is None:
        for name in chosen:
            attention_of(modules[name])
    result = copy.deepcopy(model)
    phase1_fit(result)
    for name in chosen:
        old = result.get_submodule(name)
        result.set_submodule(name, make(old).train(old.training))
    phase2_fit(result)
    return result
