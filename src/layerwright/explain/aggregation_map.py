"""Where a network that pools by attention looks: the weights with which it gathers the positions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from layerwright.core.calibration import evaluating
from layerwright.core.capture import watch_outputs
from layerwright.core.errors import InputError, unknown_name
from layerwright.nn.learned_aggregation import LearnedAggregation

__all__ = ["aggregation_maps"]


@torch.no_grad()
def aggregation_maps(
    model: nn.Module,
    images: Tensor,
    name: str | None = None,
    *,
    upsample: bool = False,
    renormalise: bool = False,
    grid: tuple[int, int] | None = None,
) -> Tensor:
    """Weights of a `LearnedAggregation` as maps: what share of the gathered token each position has, a mean over heads.

    No approximation: these are the numbers that the model multiplied with. They weigh features, though, which have seen
    their surroundings, and say nothing about the sign of what they add.

    Source: Touvron et al., "Augmenting Convolutional networks with attention-based aggregation" (2021, arXiv
    2112.13692).

    Args:
        model: any that contains a `LearnedAggregation`, such as a `PatchConvNet` or what `swap_pooling` gives. Runs in
            evaluation mode and is left as it was.
        images: ``(batch, channels, height, width)``.
        name: path of the aggregation, if there are several.
        upsample: bilinear, to the height and width of the images.
        renormalise: each map adds up to 1; otherwise what the query spends on itself is missing.
        grid: rows and columns, where the aggregation is given tokens; a square if left out.

    Returns:
        ``(batch, rows, columns)`` with one query, ``(batch, num_queries, rows, columns)`` with several.

    Raises:
        InputError: no such aggregation, several without a name, one that does not run, or a grid that does not fit.
    """
    path = _choose(model, name)
    aggregation: Any = model.get_submodule(path)
    seen: list[Tensor] = []
    with evaluating(model), watch_outputs(model, [path], lambda _path, args, _output: seen.append(args[0])):
        model(images)
        if not seen:
            raise InputError(f"name: {path or 'the aggregation'} does not run when the images pass")
        x = seen[-1]
        weights = aggregation.attention(x).mean(1)
    rows, columns = _grid(x, grid)
    maps: Tensor = weights.unflatten(-1, (rows, columns))
    if upsample:
        maps = functional.interpolate(maps, size=tuple(images.shape[-2:]), mode="bilinear", align_corners=False)
    if renormalise:
        maps = maps / maps.sum((-2, -1), keepdim=True)
    return maps[:, 0] if aggregation.num_queries == 1 else maps


def _choose(model: nn.Module, name: str | None) -> str:
    paths = [path for path, module in model.named_modules() if isinstance(module, LearnedAggregation)]
    if not paths:
        raise InputError("model: has no LearnedAggregation; see treat.swap_pooling.swap_pooling")
    if name is None:
        if len(paths) > 1:
            raise InputError(f"name: left out, expected one of {', '.join(paths)}")
        return paths[0]
    if name not in paths:
        raise unknown_name("aggregation", name, paths)
    return name


def _grid(x: Tensor, grid: tuple[int, int] | None) -> tuple[int, int]:
    """Rows and columns of what the aggregation was given."""
    if x.dim() == 4:
        return x.shape[2], x.shape[3]
    count = x.shape[1]
    rows, columns = grid or (math.isqrt(count),) * 2
    if rows * columns != count:
        raise InputError(f"grid: got {grid} for {count} tokens, expected rows and columns whose product is {count}")
    return rows, columns
