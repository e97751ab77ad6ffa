"""Points of one picture carried over to another by the scores of their matches, and how many arrive."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from layerwright.core.errors import InputError

__all__ = ["normalize_points", "pck", "pixel_points", "transfer_keypoints", "transfer_loss"]

PADDING = -2.0
"""Both coordinates of a predicted point that is not valid."""


def normalize_points(points: Tensor, height: int, width: int) -> Tensor:
    """Pixel coordinates x, y ``(..., 2)`` as numbers in -1..1 from rim to rim of the picture."""
    half = points.new_tensor([width / 2, height / 2])
    return points / half - 1


def pixel_points(points: Tensor, height: int, width: int) -> Tensor:
    """What `normalize_points` undoes."""
    half = points.new_tensor([width / 2, height / 2])
    return (points + 1) * half


def transfer_keypoints(
    corr: Tensor,
    points: Tensor,
    valid: Tensor | None = None,
    *,
    sigma: float = 17.0,
    radius: float = 0.1,
    fallback: bool = False,
) -> Tensor:
    """Where points of the source picture lie in the target ``(batch, points, 2)``, both as x, y in -1..1.

    Each source cell weighs its scores by a Gaussian around its best match, and a softmax over the target cells gives
    the place it goes to. A point goes to the mean of the places of the cells near it, weighed by
    ``max(0, radius - distance)``. The best match counts as constant for gradients. The grid's outer cells lie on the rims.

    Source: Min and Cho, "Convolutional Hough Matching Networks" (2021, arXiv 2103.16831).

    Args:
        corr: scores ``(batch, height, width, height', width')``.
        points: ``(batch, points, 2)`` in -1..1.
        valid: ``(batch, points)``, true where there is a point; all if left out. Others come back as -2.
        sigma: of the Gaussian, in target cells.
        radius: how far a cell may be from a point, in units of `points`. On grids of fewer than about 22 cells a side
            0.1 leaves gaps between the cells.
        fallback: take the nearest cell for a point without one within `radius`.

    Raises:
        InputError: shapes that do not fit, a sigma or radius that is not positive, a point outside the picture, no valid
            point at all, or a point farther than `radius` from every cell.
    """
    there = _check(corr, points, valid, sigma, radius)
    places = _expected_places(corr, sigma)
    rows, columns = (torch.linspace(-1, 1, side, device=corr.device) for side in corr.shape[1:3])
    # The small number in the root is that of the published code: it also rounds the peak of the weights.
    far = (points[..., 1, None] - rows).square()[..., None] + (points[..., 0, None] - columns).square()[:, :, None]
    distance = far.add(1e-5).sqrt().flatten(2)
    weights = (radius - distance).clamp_min(0)
    lost = there & (weights.sum(-1) <= 0)
    if lost.any():
        if not fallback:
            raise InputError(
                f"radius: {int(lost.sum())} points lie farther than {radius:g} from every one of {len(rows)} x {len(columns)} "
                "cells; use a larger radius or fallback=True"
            )
        nearest = distance == distance.amin(-1, keepdim=True)
        weights = torch.where(lost[..., None], nearest.to(weights.dtype), weights)
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    return torch.where(there[..., None], weights @ places, PADDING)


def transfer_loss(predicted: Tensor, true: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean squared distance over the points of each pair, then over the pairs that have any; a scalar.

    Args:
        predicted: ``(batch, points, 2)``.
        true: ``(batch, points, 2)``.
        valid: ``(batch, points)``.
    """
    there = torch.ones_like(true[..., 0]) if valid is None else valid.to(true.dtype)
    squares = (predicted - true).square().sum(-1) * there
    counts = there.sum(-1)
    return (squares.sum(-1) / counts.clamp_min(1)).sum() / (counts > 0).sum().clamp_min(1)


def pck(
    predicted: Tensor,
    true: Tensor,
    threshold_size: Tensor | float,
    alphas: Sequence[float],
    valid: Tensor | None = None,
) -> Tensor:
    """Share of correct points of each pair ``(batch, len(alphas))``: off by at most ``alpha * threshold_size``.

    Args:
        predicted: ``(batch, points, 2)`` in pixels.
        true: ``(batch, points, 2)`` in pixels.
        threshold_size: length for each pair ``(batch,)``, or one for all: the longer side of the picture or of the box.
        alphas: such as 0.05, 0.1, 0.15.
        valid: ``(batch, points)``; all points if left out. A pair without valid points gives NaN.

    Raises:
        InputError: shapes that differ, an empty batch, a length or an alpha that is not positive.
    """
    if predicted.shape != true.shape or true.dim() != 3 or true.shape[-1] != 2 or not true.numel():
        raise InputError(
            f"predicted, true: got shapes {tuple(predicted.shape)} and {tuple(true.shape)}, expected (batch, points, 2) twice, none of them 0"
        )
    sizes = torch.as_tensor(threshold_size, dtype=true.dtype, device=true.device).expand(len(true))
    if not bool((sizes > 0).all()):
        raise InputError(f"threshold_size: got {float(sizes.min()):g}, expected positive lengths")
    if not alphas or min(alphas) <= 0:
        raise InputError(f"alphas: got {tuple(alphas)}, expected positive numbers, at least one")
    limits = sizes[:, None, None] * true.new_tensor(list(alphas))
    near = ((predicted - true).norm(dim=-1)[..., None] <= limits).to(true.dtype)
    there = torch.ones_like(true[..., 0]) if valid is None else valid.to(true.dtype)
    return (near * there[..., None]).sum(1) / there.sum(1, keepdim=True)


def _expected_places(corr: Tensor, sigma: float) -> Tensor:
    """For each source cell the expected target place ``(batch, cells, 2)``, x and y in -1..1."""
    height, width = corr.shape[3:]
    scores = corr.float().flatten(3).flatten(1, 2) if corr.dtype.itemsize < 4 else corr.flatten(3).flatten(1, 2)
    best = scores.argmax(-1, keepdim=True)
    down = (torch.arange(height, device=corr.device) - best // width).square()
    right = (torch.arange(width, device=corr.device) - best % width).square()
    bell = torch.exp((down[..., :, None] + right[..., None, :]).to(scores.dtype) / (-2 * sigma**2))
    share = (scores * bell.flatten(2)).softmax(-1).unflatten(2, (height, width))
    rows, columns = (torch.linspace(-1, 1, side, device=corr.device, dtype=scores.dtype) for side in (height, width))
    return torch.stack([share.sum(2) @ columns, share.sum(3) @ rows], -1)


def _check(corr: Tensor, points: Tensor, valid: Tensor | None, sigma: float, radius: float) -> Tensor:
    if corr.dim() != 5 or min(corr.shape) < 1:
        raise InputError(f"corr: got shape {tuple(corr.shape)}, expected (batch, height, width, height', width')")
    if points.dim() != 3 or points.shape[0] != corr.shape[0] or points.shape[2] != 2:
        raise InputError(f"points: got shape {tuple(points.shape)}, expected ({corr.shape[0]}, points, 2)")
    there = torch.ones(points.shape[:2], dtype=torch.bool, device=points.device) if valid is None else valid
    if there.shape != points.shape[:2] or there.dtype != torch.bool:
        raise InputError(f"valid: got {there.dtype} {tuple(there.shape)}, expected bool {tuple(points.shape[:2])}")
    for name, value in (("sigma", sigma), ("radius", radius)):
        if not value > 0:
            raise InputError(f"{name}: got {value}, expected a positive number")
    if not there.any():
        raise InputError("valid: got no valid point, expected at least one")
    if not bool((points[there].abs() <= 1).all()):
        raise InputError("points: some valid points lie outside -1..1; see normalize_points, or mark them as not valid")
    return there
