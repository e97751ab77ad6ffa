"""How alike the cells of two feature maps are: 4-D and 6-D correlations, their resizing, and mutual nearest neighbours."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from layerwright.core.errors import InputError

__all__ = ["correlation_4d", "correlation_6d", "interpolate_4d", "mutual_nn_filter"]

_TINY = 1e-12


def correlation_4d(first: Tensor, second: Tensor) -> Tensor:
    """Cosines of all pairs of cells ``(batch, height, width, height', width')``, in -1..1; 0 for a cell without features.

    Args:
        first: ``(batch, channels, height, width)``.
        second: ``(batch, channels, height', width')``.

    Raises:
        InputError: other axes, or batches or channels that differ.
    """
    _check_maps(first, second)
    left, right = (functional.normalize(maps.flatten(2), dim=1, eps=_TINY) for maps in (first, second))
    return (left.transpose(1, 2) @ right).unflatten(2, second.shape[2:]).unflatten(1, first.shape[2:])


def correlation_6d(
    first: Tensor,
    second: Tensor,
    scales: Sequence[float] = (0.5, 1.0, 2.0),
    convs: Sequence[Callable[[Tensor], Tensor]] | None = None,
) -> Tensor:
    """Correlations of all pairs of scales ``(batch, S, S, height, width, height', width')``, not negative.

    Both maps are resized to ``round(side sqrt(scale))``, transformed by the function of that scale, compared, and each
    4-D correlation is resized to the sides of the maps that were given. Resizing is linear, corners on corners.

    Source: Min and Cho, "Convolutional Hough Matching Networks" (2021, arXiv 2103.16831).

    Args:
        first: ``(batch, channels, height, width)``.
        second: ``(batch, channels, height', width')``.
        scales: S areas, positive.
        convs: for each scale what both maps go through; they stay as they are if left out.

    Raises:
        InputError: other axes, batches or channels that differ, a scale that is not positive, or not one of `convs` for
            each scale.
    """
    _check_maps(first, second)
    if not scales or not all(scale > 0 and math.isfinite(scale) for scale in scales):
        raise InputError(f"scales: got {tuple(scales)}, expected positive numbers, at least one")
    if convs is not None and len(convs) != len(scales):
        raise InputError(f"convs: got {len(convs)} for {len(scales)} scales, expected one for each")
    left, right = (
        [(convs[place] if convs is not None else _same)(_resized(maps, scale)) for place, scale in enumerate(scales)]
        for maps in (first, second)
    )
    sides = (first.shape[2:], second.shape[2:])
    pairs = [interpolate_4d(correlation_4d(one, other), *sides) for one in left for other in right]
    return torch.stack(pairs, 1).clamp_min(0).unflatten(1, (len(scales), len(scales)))


def interpolate_4d(corr: Tensor, first: Sequence[int], second: Sequence[int]) -> Tensor:
    """Resize a correlation ``(batch, height, width, height', width')`` to the sides `first` and `second`, linearly.

    Corners stay on corners: each axis is read at evenly spaced places from its first cell to its last.

    Raises:
        InputError: not five axes, or a side below 1.
    """
    if corr.dim() != 5 or min(corr.shape) < 1:
        raise InputError(f"corr: got shape {tuple(corr.shape)}, expected (batch, height, width, height', width')")
    if len(first) != 2 or len(second) != 2 or min(*first, *second) < 1:
        raise InputError(f"first, second: got {tuple(first)} and {tuple(second)}, expected a height and a width each")
    sides = corr.shape[1:]
    if tuple(sides[2:]) != tuple(second):
        corr = _linear(corr.flatten(1, 2), second).unflatten(1, sides[:2])
    if tuple(sides[:2]) != tuple(first):
        corr = _linear(corr.permute(0, 3, 4, 1, 2).flatten(1, 2), first)
        corr = corr.unflatten(1, tuple(second)).permute(0, 3, 4, 1, 2)
    return corr


def mutual_nn_filter(corr: Tensor) -> Tensor:
    """Soft mutual nearest neighbours: each match times its share of the best one of either of its two cells.

    ``c * (c / max over x') * (c / max over x)``. Source: Rocco et al., "Neighbourhood Consensus Networks" (2018, arXiv
    1810.10510).

    Args:
        corr: ``(batch, height, width, height', width')``, not negative.

    Raises:
        InputError: not five axes.
    """
    if corr.dim() != 5 or min(corr.shape) < 1:
        raise InputError(f"corr: got shape {tuple(corr.shape)}, expected (batch, height, width, height', width')")
    best, best_back = corr.amax((3, 4), keepdim=True), corr.amax((1, 2), keepdim=True)
    best, best_back = (torch.where(top == 0, torch.full_like(top, 1e-30), top) for top in (best, best_back))
    return corr * ((corr / best) * (corr / best_back))


def _same(maps: Tensor) -> Tensor:
    return maps


def _resized(maps: Tensor, scale: float) -> Tensor:
    """Maps with sides ``round(side sqrt(scale))``, at least 1."""
    sides = [max(1, round(side * math.sqrt(scale))) for side in maps.shape[2:]]
    return _linear(maps, sides)


def _linear(maps: Tensor, sides: Sequence[int]) -> Tensor:
    return functional.interpolate(maps, tuple(sides), mode="bilinear", align_corners=True)


def _check_maps(first: Tensor, second: Tensor) -> None:
    for name, maps in (("first", first), ("second", second)):
        if not maps.is_floating_point():
            raise TypeError(f"{name}: got {maps.dtype}, expected floating-point numbers")
        if maps.dim() != 4 or not maps.numel():
            raise InputError(
                f"{name}: got shape {tuple(maps.shape)}, expected (batch, channels, height, width), none of them 0"
            )
    if first.shape[:2] != second.shape[:2]:
        raise InputError(
            f"second: got batch and channels {tuple(second.shape[:2])}, expected those of first, {tuple(first.shape[:2])}"
        )
