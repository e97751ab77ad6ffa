"""Sizes of the convolutions and linear layers of a model, as the data runs through them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from layerwright.core.calibration import evaluating
from layerwright.core.capture import first_tensor
from layerwright.core.conv_factors import ConvShape
from layerwright.core.errors import InputError

__all__ = ["conv_shapes"]


@torch.no_grad()
def conv_shapes(model: nn.Module, run: Callable[[], object], needed: Iterable[str] = ()) -> dict[str, ConvShape]:
    """Path to sizes of every convolution and linear layer, in the order in which one `run` reaches them.

    A layer that runs several times is listed once, with its first sizes. A linear layer counts as a convolution with a
    kernel of 1 x 1, its tokens as the width; a convolution in one dimension has height 1.

    Args:
        model: left untouched.
        run: one forward of `model`.
        needed: layers that must be reached.

    Raises:
        InputError: a needed layer that `run` never reaches, so that its sizes are not known; names the layer.
    """
    found: dict[str, ConvShape] = {}
    handles = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear):
            continue

        def watch(module: nn.Module, inputs: Any, output: Any, path: str = path) -> None:
            found.setdefault(path, _shape(module, first_tensor(inputs), first_tensor(output)))

        handles.append(module.register_forward_hook(watch))
    try:
        with evaluating(model):
            run()
    finally:
        for handle in handles:
            handle.remove()
    for path in needed:
        if path not in found:
            raise InputError(f"{path}: the data never reaches it, so that the size of its output is not known")
    return found


def _shape(module: nn.Module, x: Tensor, y: Tensor) -> ConvShape:
    if isinstance(module, nn.Linear):
        tokens = x.shape[-2] if x.dim() > 2 else 1
        return ConvShape(module.in_features, module.out_features, (1, 1), (1, 1), (1, tokens), (1, tokens))
    assert isinstance(module, nn.Conv1d | nn.Conv2d)
    pairs = [_pair(size) for size in (module.kernel_size, module.stride, x.shape[-_axes(module) :])]
    return ConvShape(
        module.in_channels,
        module.out_channels,
        pairs[0],
        pairs[1],
        pairs[2],
        _pair(y.shape[-_axes(module) :]),
        module.groups,
    )


def _axes(module: nn.Module) -> int:
    return 2 if isinstance(module, nn.Conv2d) else 1


def _pair(sizes: Any) -> tuple[int, int]:
    numbers = [int(size) for size in sizes]
    return (1, numbers[0]) if len(numbers) == 1 else (numbers[0], numbers[1])
