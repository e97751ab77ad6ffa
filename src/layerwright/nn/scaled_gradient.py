"""The identity whose gradient is scaled."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from layerwright.core.errors import InputError

__all__ = ["scale_gradient"]


def scale_gradient(x: Tensor, w: float) -> Tensor:
    """`x` itself; the gradient that goes back through it is multiplied by `w`.

    With it the exits of a network share their blocks evenly: see `MultiExit`. Nothing is added to the graph where no
    gradient is recorded, or where `w` is 1.

    Args:
        x: any shape.
        w: finite.

    Raises:
        InputError: `w` is not finite.
    """
    if not math.isfinite(w):
        raise InputError(f"w: got {w}, expected a finite number")
    if w == 1 or not (torch.is_grad_enabled() and x.requires_grad):
        return x
    scaled: Tensor = _Scaled.apply(x, float(w))  # type: ignore[no-untyped-call]
    return scaled


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: float) -> Tensor:
        ctx.w = w
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.w * gradients[0], None
