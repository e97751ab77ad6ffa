"""Which small runs tell most about a law."""

from __future__ import annotations

import math

import numpy

from layerwright.core.errors import InputError, unknown_name
from layerwright.theory.scaling.laws import LAWS, published

__all__ = ["plan_runs"]


def plan_runs(
    budget: float,
    runs: int = 12,
    law: str = "ND",
    *,
    sizes: tuple[float, float] = (1e4, 1e7),
    grid: int = 9,
) -> list[dict[str, float]]:
    """`runs` small runs that together cost at most `budget` operations and determine the exponents best.

    Greedy D-optimal design: of a grid over the logs of size and tokens, the run is added that raises the determinant of
    the information most for its law around the published constants (Kaplan et al., 2020), while enough budget is left
    for the others.

    Args:
        budget: floating-point operations of all runs together.
        runs: how many, at least two more than the law has parameters; no two are alike.
        law: ``ND`` or ``chinchilla``.
        sizes: smallest and largest ``n_params``.
        grid: points in each direction.

    Returns:
        Mappings with ``n_params``, ``tokens`` and ``flops``, by size.

    Raises:
        InputError: a budget that even the smallest runs exceed, too few runs, or another law.
    """
    if law not in ("ND", "chinchilla"):
        raise unknown_name("law", law, ("ND", "chinchilla"))
    form = LAWS[law]
    if runs < form.parameters + 2:
        raise InputError(f"runs: got {runs}, expected at least {form.parameters + 2} for the law {law}")
    if not (math.isfinite(budget) and budget > 0):
        raise InputError(f"budget: got {budget}, expected a positive number of operations")
    n = numpy.geomspace(*sizes, grid)
    ratio = numpy.geomspace(1, 1000, grid)
    points = numpy.array([(size, size * share) for size in n for share in ratio])
    costs = 6 * points[:, 0] * points[:, 1]
    if runs > len(points):
        raise InputError(f"runs: got {runs}, expected at most {len(points)}, the points of the grid; raise grid")
    reserve = numpy.concatenate([[0.0], numpy.cumsum(numpy.sort(costs))])  # of the cheapest so many
    if reserve[runs] > budget:
        raise InputError(
            f"budget: {budget:g} is less than the {reserve[runs]:.3g} of the {runs} smallest runs; raise it"
        )
    theta = form.theta(published("ND") | ({"L_inf": 1.0} if form.floor else {}))
    slopes = form.gradient(theta, numpy.log(points.T))[1]
    slopes = slopes / numpy.linalg.norm(slopes, axis=0)
    information = 1e-9 * numpy.eye(form.parameters)
    left = budget
    chosen: list[int] = []
    for number in range(runs):
        usable = costs <= left - reserve[runs - number - 1]
        gain = numpy.array([numpy.linalg.slogdet(information + numpy.outer(s, s))[1] for s in slopes])
        usable[chosen] = False
        best = int(numpy.argmax(numpy.where(usable, gain, -numpy.inf)))
        information += numpy.outer(slopes[best], slopes[best])
        left -= float(costs[best])
        chosen.append(best)
    rows = [{"n_params": float(points[i, 0]), "tokens": float(points[i, 1]), "flops": float(costs[i])} for i in chosen]
    return sorted(rows, key=lambda row: (row["n_params"], row["tokens"]))
