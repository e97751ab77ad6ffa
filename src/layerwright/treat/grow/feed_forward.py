"""Wider feed-forward parts of transformers, the same function."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from layerwright.core.errors import InputError, unknown_name
from layerwright.core.layer import LayerRef, get_parameter, to_matrices
from layerwright.core.layers import structure_copy
from layerwright.nn.resized import ResizedLinear
from layerwright.treat.grow.growth_map import GrowthMap, growth_map, widen_consumer, widen_producer
from layerwright.treat.narrow import feed_forwards

__all__ = ["widen_mlp", "widen_mlp_"]

M = TypeVar("M", bound=nn.Module)


def widen_mlp(
    model: M, part: str, new_width: int, generator: torch.Generator | None = None, noise: float = 0.0
) -> tuple[M, GrowthMap]:
    """A model with a wider feed-forward part, as `widen_mlp_` makes it; `model` is left untouched.

    All other tensors are shared with `model`.
    """
    wider = structure_copy(model)
    return wider, widen_mlp_(wider, part, new_width, generator, noise)


@torch.no_grad()
def widen_mlp_(
    model: nn.Module, part: str, new_width: int, generator: torch.Generator | None = None, noise: float = 0.0
) -> GrowthMap:
    """Give a feed-forward part `new_width` inner neurons, in place: new ones repeat old ones.

    Gate and up projection take the same map, and the columns of the last projection are divided, so the function
    stays. New layers take the place of the old ones; they are saved with their size.

    Args:
        model: any model with blocks.
        part: path of the last projection, as `layerwright.treat.narrow.feed_forwards` names it.
        new_width: inner neurons afterwards, more than now.
        generator: of the map and the noise; seed 0 if left out.
        noise: standard deviation of the noise on the new rows, as a share of that of each weight.

    Raises:
        InputError: no such part, or `new_width` is not larger.
    """
    parts = feed_forwards(model)
    if part not in parts:
        if not parts:
            raise InputError(f"part: {type(model).__name__} has no plain feed-forward part")
        raise unknown_name("feed-forward part", part, parts)
    found = parts[part]
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    growth = growth_map(found.neurons, new_width, generator)
    for ref in found.layers:
        module = model.get_submodule(ref.path)
        weight = to_matrices(get_parameter(model, ref.parameter).detach(), ref.layout)[0]
        bias: Tensor | None = getattr(module, "bias", None)
        if ref.role == "down":
            weight = widen_consumer(weight, growth)
        else:
            weight, bias = _rows(ref, weight, bias, growth, noise, generator)
        weight.requires_grad_(get_parameter(model, ref.parameter).requires_grad)
        owner, _, name = ref.path.rpartition(".")
        setattr(model.get_submodule(owner), name, ResizedLinear.from_weight(weight, bias).train(module.training))
    return growth


def _rows(
    ref: LayerRef,
    weight: Tensor,
    bias: Tensor | None,
    growth: GrowthMap,
    noise: float,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor | None]:
    """Rows of a producer; gate and up in one weight are two halves of the same map."""
    halves = 2 if ref.role == "gate_up" else 1
    rows = [widen_producer(half, growth, noise, generator) for half in weight.chunk(halves)]
    shifts = None if bias is None else [widen_producer(half, growth) for half in bias.detach().chunk(halves)]
    return torch.cat(rows), None if shifts is None else torch.cat(shifts).requires_grad_(bias.requires_grad)  # type: ignore[union-attr]
