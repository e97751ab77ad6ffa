"""Shapes of equal cost: deeper and narrower, or shallower and wider, with as many parameters or operations (2022)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from layerwright.core.errors import BudgetError, InputError

__all__ = ["Shape", "equal_flops_shapes", "equal_parameter_shapes", "shape_of"]


@dataclass(frozen=True)
class Shape:
    """A transformer's depth and width.

    Attributes:
        layers, dim, heads: blocks, features of a token, heads of a block.
        ffn_dim: width of the feed-forward parts.
        gated: feed-forward parts of three matrices (SwiGLU) in place of two.
    """

    layers: int
    dim: int
    heads: int
    ffn_dim: int
    gated: bool = False

    @property
    def params(self) -> int:
        """Weights of all blocks without biases, norms and embeddings: ``layers (4 dim^2 + [2 or 3] dim ffn_dim)``."""
        return self.layers * self.dim * (4 * self.dim + (3 if self.gated else 2) * self.ffn_dim)

    @property
    def name(self) -> str:
        """Layers by width, such as ``12x768``."""
        return f"{self.layers}x{self.dim}"

    def flops_per_token(self, tokens: int, *, causal: bool = False) -> int:
        """Operations of the blocks for each of `tokens`: ``2 params + 4 layers tokens dim``, half the second if `causal`."""
        return 2 * self.params + (2 if causal else 4) * self.layers * tokens * self.dim

    def to_data(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"name": self.name, **asdict(self), "params": self.params}


def shape_of(
    layers: int,
    dim: int,
    *,
    head_dim: int = 64,
    heads: int | None = None,
    ffn_ratio: float = 4.0,
    gated: bool = False,
) -> Shape:
    """One shape; a gated feed-forward part is two thirds as wide, so that it has as many weights.

    Raises:
        InputError: `head_dim` or `heads` does not divide `dim`, or a number outside its range.
    """
    if min(layers, dim) < 1 or not ffn_ratio > 0:
        raise InputError(f"shape: got {layers} layers, width {dim}, ffn_ratio {ffn_ratio}; expected positive numbers")
    if heads is None:
        if head_dim < 1 or dim % head_dim:
            raise InputError(f"head_dim: got {head_dim} for a width of {dim}, expected a divisor")
        heads = dim // head_dim
    elif heads < 1 or dim % heads:
        raise InputError(f"heads: got {heads} for a width of {dim}, expected a divisor")
    width = ffn_ratio * dim * (2 / 3 if gated else 1)
    return Shape(layers, dim, heads, max(1, round(width)), gated)


def equal_parameter_shapes(
    params: float,
    depths: Sequence[int],
    head_dim: int = 64,
    multiple: int | None = None,
    tolerance: float = 0.03,
    *,
    heads: int | None = None,
    ffn_ratio: float = 4.0,
    gated: bool = False,
    skip: bool = False,
) -> list[Shape]:
    """For each depth the width at which the blocks have `params` weights, ``12 layers dim^2`` at the usual ratio of 4.

    Source: Xue et al., 2022, A Study on Transformer Configuration and Training Objective, arXiv 2205.10505.

    Args:
        params: weights of the blocks; embeddings, biases and norms apart.
        depths: numbers of layers, each once.
        head_dim: features of a head, which divides every width; heads are as many as it takes.
        multiple: widths are multiples of it, by default of `head_dim`.
        tolerance: share by which `params` may be missed.
        heads: fix the number of heads instead; `head_dim` is not looked at, and widths are multiples of it.
        ffn_ratio: width of feed-forward parts over `dim`.
        gated: see `Shape`.
        skip: leave out depths without a width within the tolerance, where there is one with.

    Returns:
        Shapes in order of depth.

    Raises:
        InputError: a number outside its range, or a depth twice.
        BudgetError: a depth that no width fits (any depth, or with `skip` all of them); says what is feasible.
    """

    def cost(shape: Shape) -> float:
        return shape.params

    return _shapes("params", cost, params, depths, head_dim, multiple, tolerance, heads, ffn_ratio, gated, skip)


def equal_flops_shapes(
    flops: float,
    depths: Sequence[int],
    tokens: int,
    head_dim: int = 64,
    multiple: int | None = None,
    tolerance: float = 0.03,
    *,
    causal: bool = False,
    heads: int | None = None,
    ffn_ratio: float = 4.0,
    gated: bool = False,
    skip: bool = False,
) -> list[Shape]:
    """For each depth the width at which the blocks take `flops` operations for each of `tokens` tokens.

    Attention between tokens counts, so that deep shapes, in which it is more, have fewer parameters.
    Arguments and errors as of `equal_parameter_shapes`; `causal` halves attention.
    """
    if tokens < 1:
        raise InputError(f"tokens: got {tokens}, expected at least 1")

    def cost(shape: Shape) -> float:
        return shape.flops_per_token(tokens, causal=causal)

    return _shapes("flops", cost, flops, depths, head_dim, multiple, tolerance, heads, ffn_ratio, gated, skip)


def _shapes(
    what: str,
    cost: Callable[[Shape], float],
    target: float,
    depths: Sequence[int],
    head_dim: int,
    multiple: int | None,
    tolerance: float,
    heads: int | None,
    ffn_ratio: float,
    gated: bool,
    skip: bool,
) -> list[Shape]:
    if not (math.isfinite(target) and target > 0):
        raise BudgetError(f"{what}: got {target}, expected a positive number")
    if not depths or min(depths) < 1 or len(set(depths)) < len(depths):
        raise InputError(f"depths: got {list(depths)}, expected numbers of layers of at least 1, each once")
    if not 0 <= tolerance < 1:
        raise InputError(f"tolerance: got {tolerance}, expected a share in [0, 1)")
    unit = head_dim if heads is None else heads
    step = multiple or unit
    if unit < 1 or step % unit:
        name = "head_dim" if heads is None else "heads"
        raise InputError(f"{name}: {unit} does not divide widths that are multiples of {step}; give a multiple of it")

    def made(layers: int, width: int) -> Shape:
        return shape_of(layers, width, head_dim=head_dim, heads=heads, ffn_ratio=ffn_ratio, gated=gated)

    closest = [_closest(partial(made, layers), cost, target, step) for layers in sorted(depths)]
    fitting = [shape for shape in closest if abs(cost(shape) - target) <= tolerance * target]
    if len(fitting) < len(closest) and not (skip and fitting):
        missed = ", ".join(
            f"{shape.name} ({cost(shape) / target - 1:+.1%})" for shape in closest if shape not in fitting
        )
        feasible = ", ".join(shape.name for shape in fitting) or "none"
        raise BudgetError(
            f"{what}: {target:.4g} within {tolerance:.1%} has no width for {missed}, widths being multiples of {step}; "
            f"feasible: {feasible}; raise the tolerance or lower head_dim"
        )
    return fitting


def _closest(made: Callable[[int], Shape], cost: Callable[[Shape], float], target: float, step: int) -> Shape:
    """The width, a multiple of `step`, whose cost comes closest; cost rises with it."""
    low, high = 0, 1
    while cost(made(high * step)) < target:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(made(middle * step)) < target else (low, middle)
    return min((made(n * step) for n in (low, high) if n), key=lambda shape: abs(cost(shape) - target))
