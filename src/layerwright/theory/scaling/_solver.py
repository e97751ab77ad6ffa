"""Robust least squares for many starts or many resamplings at once."""

from __future__ import annotations

from collections.abc import Callable

import numpy
from numpy.typing import NDArray

__all__ = ["finite_rows", "huber", "solve"]

Array = NDArray[numpy.float64]
Model = Callable[[Array], tuple[Array, Array]]
"""``model(theta (batch, parameters)) -> (values (batch, points), derivatives (batch, points, parameters))``."""


def finite_rows(theta: Array) -> NDArray[numpy.bool_]:
    """Which parameter vectors ``(batch,)`` hold finite numbers alone."""
    return numpy.asarray(numpy.isfinite(theta).all(-1), dtype=numpy.bool_)


def huber(residuals: Array, delta: float) -> Array:
    """Huber's loss: ``r**2 / 2`` up to `delta`, linear beyond."""
    size = numpy.abs(residuals)
    return numpy.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta))


def solve(
    model: Model,
    observed: Array,
    starts: Array,
    weights: Array,
    *,
    delta: float,
    valid: Callable[[Array], NDArray[numpy.bool_]],
    steps: int = 60,
    tolerance: float = 1e-10,
) -> tuple[Array, Array]:
    """Levenberg and Marquardt's method on a weighted Huber loss, for a batch of problems side by side.

    Args:
        model: see `Model`.
        observed: ``(points,)``.
        starts: ``(batch, parameters)``.
        weights: ``(batch, points)``, 0 and above.
        delta: of the Huber loss.
        valid: which parameter vectors ``(batch,)`` may be taken; a step to another is refused.
        steps: at most.
        tolerance: relative fall of the loss below which a problem counts as solved.

    Returns:
        Parameters ``(batch, parameters)`` and losses ``(batch,)``; infinite where nothing was valid.
    """
    theta = starts.copy()
    damping = numpy.full(len(theta), 1e-3)
    values, slopes = model(theta)
    cost = _cost(values - observed, weights, delta, valid(theta))
    active = numpy.isfinite(cost)
    identity = numpy.eye(theta.shape[1])
    for _ in range(steps):
        if not active.any():
            break
        r = values[active] - observed
        w = weights[active] * delta / numpy.maximum(numpy.abs(r), delta)
        j = slopes[active]
        normal = numpy.einsum("bpi,bp,bpj->bij", j, w, j)
        downhill = numpy.einsum("bpi,bp->bi", j, w * r)
        scale = numpy.maximum(numpy.einsum("bii->bi", normal), 1e-12)
        matrix = normal + (damping[active, None] * scale)[..., None] * identity
        trial = theta[active] - numpy.linalg.solve(matrix, downhill[..., None])[..., 0]
        fresh, derivatives = model(trial)
        found = _cost(fresh - observed, weights[active], delta, valid(trial))
        better = found < cost[active]
        where = numpy.flatnonzero(active)
        taken = where[better]
        small = (cost[taken] - found[better]) <= tolerance * cost[taken] + 1e-300
        theta[taken], values[taken], slopes[taken] = trial[better], fresh[better], derivatives[better]
        cost[taken] = found[better]
        damping[taken] *= 0.3
        damping[where[~better]] *= 4
        active[taken[small]] = False
        active[where[damping[where] > 1e12]] = False
    return theta, cost


def _cost(residuals: Array, weights: Array, delta: float, valid: NDArray[numpy.bool_]) -> Array:
    with numpy.errstate(all="ignore"):
        cost = (weights * huber(residuals, delta)).sum(-1)
    return numpy.where(valid & numpy.isfinite(cost), cost, numpy.inf)
