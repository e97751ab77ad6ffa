"""Which shapes a comparison has: settings, budgets as people write them, depths with the widths that belong to them."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerwright.allocate.equal_parameters import Shape, equal_flops_shapes, equal_parameter_shapes
from layerwright.core.errors import BudgetError, CheckError
from layerwright.recipes._shape_task import ShapeTask

__all__ = ["ShapeSettings", "enumerate_shapes", "parse_count"]

DEPTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48)
HEAD_DIMS = (64, 32, 16, 8, 4)
FINEST, USUAL_HEAD = 4, 16
"""Widths that are multiples of `FINEST` come last; their heads are about `USUAL_HEAD` wide, as their divisors allow."""
RATIOS = (2.0, 4.0, 8.0)
ASPECTS = ("depth", "ffn", "heads")
WIDEST, NARROWEST = 384.0, 4.0
"""Width over depth of shapes that are proposed."""
_COUNT = re.compile(r"([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*([kmb]?)", re.IGNORECASE)


@dataclass(frozen=True)
class ShapeSettings:
    """What is compared, and how.

    Attributes:
        params: weights of the blocks.
        task: see `layerwright.recipes._shape_tasks.TASKS`.
        match: ``params``, or ``flops``: as many operations for each token as the shape of `params` in the middle.
        aspect: of ``depth`` (with width), ``ffn`` (width of feed-forward parts), ``heads`` (their width).
        depths: numbers of layers; None proposes some.
        head_dim: features of a head; None takes the largest that fits enough depths.
        tolerance: share by which the budget may be missed.
        steps, batch, rate: of training; the same for all shapes.
        seeds: of data and weights, from 0.
        data: the user's own file.
        limit: shapes at most, where depths are proposed.
        rounds: of the measurement of time.
    """

    params: float
    task: str
    match: str = "params"
    aspect: tuple[str, ...] = ("depth",)
    depths: tuple[int, ...] | None = None
    head_dim: int | None = None
    tolerance: float = 0.05
    steps: int = 100
    batch: int = 8
    rate: float = 2e-3
    seeds: int = 3
    data: Path | None = None
    limit: int = 4
    rounds: int = 10

    def check(self) -> None:
        """Raise `CheckError` with all that is wrong."""
        problems = [
            f"{name}: got {getattr(self, name)}, expected at least 1"
            for name in ("steps", "batch", "seeds", "limit", "rounds")
            if getattr(self, name) < 1
        ]
        if self.match not in ("params", "flops"):
            problems.append(f"match: got {self.match!r}, expected params or flops")
        if unknown := [name for name in self.aspect if name not in ASPECTS] or (not self.aspect and ["nothing"]):
            problems.append(f"aspect: got {unknown[0]}, expected some of {', '.join(ASPECTS)}")
        if not (math.isfinite(self.rate) and self.rate > 0):
            problems.append(f"rate: got {self.rate}, expected a positive number")
        if problems:
            raise CheckError(problems)


def parse_count(text: str) -> float:
    """``10M``, ``250k``, ``1.5B``, ``1e6`` as a number.

    Raises:
        BudgetError: anything else, or zero.
    """
    found = _COUNT.fullmatch(text.strip())
    value = float(found[1]) * {"": 1, "k": 1e3, "m": 1e6, "b": 1e9}[found[2].lower()] if found else 0.0
    if not (math.isfinite(value) and value >= 1):
        raise BudgetError(f"params: got {text!r}, expected a number of parameters such as 10M, 250k or 1e6")
    return value


def enumerate_shapes(settings: ShapeSettings, task: ShapeTask) -> list[Shape]:
    """Shapes of equal parameters, or of equal operations for each token, in order of depth.

    Raises:
        BudgetError: no shape, or a depth that was asked for has none; says what is feasible.
    """
    given = [settings.head_dim] if settings.head_dim else HEAD_DIMS
    base = _family(settings, task, 4.0, given)
    if "depth" not in settings.aspect:
        base = [base[len(base) // 2]]
    found = dict.fromkeys(base)
    ratios = RATIOS if "ffn" in settings.aspect else (4.0,)
    for shape, ratio in itertools.product(base, ratios):
        width = shape.dim // shape.heads
        for head_dim in (width // 2, width, 2 * width) if "heads" in settings.aspect else (width,):
            if head_dim < 2 or head_dim % 2 or (ratio, head_dim) == (4.0, width):
                continue
            one = dataclasses.replace(settings, depths=(shape.layers,))
            with contextlib.suppress(BudgetError):  # the base shape stands; this variant of it does not exist
                found |= dict.fromkeys(_family(one, task, ratio, [head_dim]))
    return sorted(found, key=lambda shape: (shape.layers, shape.dim, shape.heads, shape.ffn_dim))


def _family(settings: ShapeSettings, task: ShapeTask, ratio: float, head_dims: Sequence[int]) -> list[Shape]:
    """Shapes at the largest width of heads that gives enough of them."""
    asked = settings.depths
    wanted = len(asked) if asked else min(settings.limit, 4)
    best: list[Shape] = []
    for head_dim in head_dims:
        common: dict[str, Any] = {"tolerance": settings.tolerance, "ffn_ratio": ratio, "gated": task.gated}
        try:
            shapes = _matched(settings, task, asked or DEPTHS, head_dim, {**common, "skip": True})
        except BudgetError:
            continue
        if head_dim == FINEST and settings.head_dim is None and len(head_dims) > 1:
            shapes = [_wider_heads(shape) for shape in shapes]
        if not asked:
            shapes = [s for s in shapes if NARROWEST <= s.dim / s.layers <= WIDEST]
            shapes = _spread(shapes, settings.limit)
        if len(shapes) > len(best):
            best = shapes
        if len(best) >= wanted:
            break
    if len(best) < (wanted if asked else 1):
        _matched(settings, task, asked or DEPTHS, head_dims[-1], {**common, "skip": False})  # says what is feasible
        raise BudgetError(
            f"params: {settings.params:.4g} has no shape of a width of {NARROWEST:g} to {WIDEST:g} times its depth; give --depths"
        )
    return best


def _wider_heads(shape: Shape) -> Shape:
    """The shape with heads of an even width that is nearest to the usual one; weights do not depend on it."""
    widths = [width for width in range(2, shape.dim + 1, 2) if shape.dim % width == 0]
    best = min(widths, key=lambda width: (abs(math.log(width / USUAL_HEAD)), width))
    return dataclasses.replace(shape, heads=shape.dim // best)


def _matched(
    settings: ShapeSettings, task: ShapeTask, depths: Sequence[int], head_dim: int, more: dict[str, Any]
) -> list[Shape]:
    if settings.match == "params":
        return equal_parameter_shapes(settings.params, depths, head_dim, **more)
    middle = sorted(depths)[len(depths) // 2]
    loose = {**more, "tolerance": 0.5, "ffn_ratio": 4.0}
    (reference,) = equal_parameter_shapes(settings.params, [middle], head_dim, **loose)
    flops = reference.flops_per_token(task.tokens, causal=task.causal)
    return equal_flops_shapes(flops, depths, task.tokens, head_dim, causal=task.causal, **more)


def _spread(shapes: Sequence[Shape], limit: int) -> list[Shape]:
    """At most `limit` of them, both ends among them, evenly spread over their order."""
    if len(shapes) <= limit:
        return list(shapes)
    places = {round(n * (len(shapes) - 1) / max(1, limit - 1)) for n in range(limit)}
    return [shapes[place] for place in sorted(places)]
