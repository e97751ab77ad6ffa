"""`layerwright shape`: shapes of equal parameters or operations, trained briefly on the same data and compared."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from layerwright.allocate.depth_width import Comparison, compare_with_best
from layerwright.allocate.equal_parameters import Shape
from layerwright.core.errors import InputError
from layerwright.recipes._shape_cost import shape_costs
from layerwright.recipes._shape_family import ShapeSettings, enumerate_shapes, parse_count
from layerwright.recipes._shape_state import RESULT, RunState, write_json
from layerwright.recipes._shape_task import ShapeTask
from layerwright.recipes._shape_tasks import open_task, task_name
from layerwright.score.smoothing import hc_ratio, token_cosine
from layerwright.tune._loop import Schedule, train_

__all__ = ["ShapeReport", "ShapeSettings", "compare_shapes", "enumerate_shapes", "parse_count"]

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ShapeReport:
    """What a comparison gave.

    Attributes:
        settings: of the comparison.
        quality, higher_is_better: what was compared.
        rows: a mapping for each shape, in order of enumeration.
        ranking: shapes that trained, best first, each against the best one.
        fastest: of the shapes that are within noise of the best one, the one of the lowest latency.
        runs: a mapping for each shape and seed.
        forecast_seconds, seconds: of the training that was left to do.
    """

    settings: dict[str, Any]
    quality: str
    higher_is_better: bool
    rows: Sequence[dict[str, Any]]
    ranking: Sequence[Comparison]
    fastest: str
    runs: Sequence[dict[str, Any]]
    forecast_seconds: float
    seconds: float

    @property
    def best(self) -> str:
        """Name of the shape with the best mean."""
        return self.ranking[0].name

    def to_data(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "settings": self.settings,
            "quality": self.quality,
            "higher_is_better": self.higher_is_better,
            "best": self.best,
            "within_noise": [row.name for row in self.ranking[1:] if row.within_noise],
            "noise_is_known": self.settings["seeds"] > 1,
            "fastest_within_noise": self.fastest,
            "shapes": list(self.rows),
            "ranking": [row.to_data() for row in self.ranking],
            "runs": list(self.runs),
            "forecast_seconds": self.forecast_seconds,
            "seconds": self.seconds,
        }


def compare_shapes(
    settings: ShapeSettings,
    out: Path | None = None,
    *,
    objective: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
    told: Callable[[str], None] | None = None,
) -> ShapeReport:
    """Train each shape for each seed on the same batches in the same order, measure it, and compare.

    Runs that `out` holds already are not trained again. Written there are ``runs.json`` after each run, and ``shape.json``.

    Args:
        settings: see `ShapeSettings`.
        out: folder; None writes nothing.
        objective: see `layerwright.recipes._shape_tasks.task_name`.
        force: start anew where `out` holds something else.
        progress: ``progress(what, done, total)``.
        told: called with the shapes and the forecast before training starts.

    Raises:
        CheckError: settings outside their range.
        InputError: an unknown task, data that cannot be used, a folder that holds something else, or no shape that trained.
        BudgetError: no shape within the tolerance.
    """
    settings.check()
    name = task_name(settings.task, objective)
    task = open_task(name, settings.data)
    shapes = enumerate_shapes(settings, task)
    fixed = {
        "task": name,
        "steps": settings.steps,
        "batch": settings.batch,
        "rate": settings.rate,
        "data": task.data,
    }
    state = RunState(out, fixed, force=force)
    plan = [(shape, seed) for shape in shapes for seed in range(settings.seeds)]
    left = [pair for pair in plan if state.get(_key(*pair)) is None]
    forecast = _forecast(task, settings, left)
    if told:
        told(_sentence(shapes, plan, left, forecast))
    begun = time.perf_counter()
    for number, (shape, seed) in enumerate(left):
        state.add(_key(shape, seed), _trained(task, settings, shape, seed))
        if progress:
            progress(f"training {label(shape)}, seed {seed}", number + 1, len(left))
    seconds = time.perf_counter() - begun
    costs = shape_costs(task, shapes, batch=settings.batch, rounds=settings.rounds)
    runs = [state.rows[_key(*pair)] for pair in plan]
    rows = [_row(shape, cost, runs) for shape, cost in zip(shapes, costs, strict=True)]
    report = _report(settings, fixed, task, rows, runs, forecast, seconds)
    if out is not None:
        write_json(out / RESULT, report.to_data())
    return report


def label(shape: Shape) -> str:
    """Layers, width, heads and inner width: ``6x192, 6 heads, ffn 768``."""
    return f"{shape.name}, {shape.heads} heads, ffn {shape.ffn_dim}"


def _key(shape: Shape, seed: int) -> str:
    return f"{shape.layers}-{shape.dim}-{shape.heads}-{shape.ffn_dim}-{seed}"


def _trained(task: ShapeTask, settings: ShapeSettings, shape: Shape, seed: int) -> dict[str, Any]:
    """One run: trained, judged, looked at. A loss that is not finite makes a failed run, not an error."""
    row: dict[str, Any] = {"shape": label(shape), "seed": seed, "failed": False}
    model = task.build(shape, seed)
    begun = time.perf_counter()
    try:
        _train(task, settings, model, settings.steps, seed)
    except InputError as error:
        if "not finite" not in str(error):
            raise
        return {**row, "failed": True, "reason": str(error)}
    row["seconds"] = time.perf_counter() - begun
    row |= task.judge(model.eval())
    row["failed"] = not all(math.isfinite(row[name]) for name in ("quality", "loss"))
    batches = [task.example(min(8, settings.batch))]
    trunk = task.trunk(model)
    row["hc_ratio"] = list(hc_ratio(trunk, batches, drop_cls=task.drop_cls).values())[-1]
    row["token_cosine"] = list(token_cosine(trunk, batches, drop_cls=task.drop_cls).values())[-1]
    return row


def _train(task: ShapeTask, settings: ShapeSettings, model: nn.Module, steps: int, seed: int) -> None:
    schedule = Schedule(steps, settings.rate, 0.05, warmup=0.1, seed=seed)
    train_(model, task.items(steps, settings.batch, seed), task.loss, schedule, distributed=False, training=True)


def _forecast(task: ShapeTask, settings: ShapeSettings, left: Sequence[tuple[Shape, int]]) -> float:
    """Seconds of the runs that are left: two steps of each shape, after one that warms up, and one judgement."""
    pace: dict[Shape, float] = {}
    judging = 0.0
    for shape, _ in left:
        if shape in pace:
            continue
        model = task.build(shape, 0)
        _train(task, settings, model, 1, 0)
        begun = time.perf_counter()
        _train(task, settings, model, 2, 0)
        pace[shape] = (time.perf_counter() - begun) / 2
        if not judging:
            begun = time.perf_counter()
            task.judge(model.eval())
            judging = (time.perf_counter() - begun) / max(pace[shape], 1e-9)  # in steps
    return sum(pace[shape] * (settings.steps + judging) for shape, _ in left)


def _sentence(shapes: Sequence[Shape], plan: Sequence[object], left: Sequence[object], forecast: float) -> str:
    names = "; ".join(f"{label(shape)}: {shape.params:,}" for shape in shapes)
    kept = f" ({len(plan) - len(left)} kept from before)" if len(left) < len(plan) else ""
    return f"shapes (weights of their blocks): {names}\nforecast: {len(left)} runs{kept}, about {forecast:.0f} s"


def _row(shape: Shape, cost: dict[str, Any], runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    own = [run for run in runs if run["shape"] == label(shape)]
    done = [run for run in own if not run["failed"]]
    row: dict[str, Any] = {
        "shape": label(shape),
        "layers": shape.layers,
        "dim": shape.dim,
        "heads": shape.heads,
        "ffn_dim": shape.ffn_dim,
        **cost,
        "failed": len(own) - len(done),
    }
    for name in ("quality", "loss", "hc_ratio", "token_cosine"):
        row[name] = statistics.fmean(run[name] for run in done) if done else None
    row["quality_spread"] = statistics.stdev(run["quality"] for run in done) if len(done) > 1 else None
    return row


def _report(
    settings: ShapeSettings,
    fixed: dict[str, Any],
    task: ShapeTask,
    rows: Sequence[dict[str, Any]],
    runs: Sequence[dict[str, Any]],
    forecast: float,
    seconds: float,
) -> ShapeReport:
    whole = [row["shape"] for row in rows if not row["failed"]]
    if not whole:
        raise InputError(f"no shape trained: the loss was not finite in every one; lower --rate ({settings.rate:g})")
    values = {name: [run["quality"] for run in runs if run["shape"] == name] for name in whole}
    ranking = compare_with_best(values, higher_is_better=task.higher_is_better)
    near = {row.name for row in ranking if row.within_noise}
    fastest = min((row for row in rows if row["shape"] in near), key=lambda row: row["latency_ms"])["shape"]
    used = {**fixed, "params": settings.params, "match": settings.match, "seeds": settings.seeds}
    used |= {"aspect": list(settings.aspect), "tolerance": settings.tolerance}
    return ShapeReport(used, task.quality, task.higher_is_better, rows, ranking, fastest, runs, forecast, seconds)
