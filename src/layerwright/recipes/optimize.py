"""The whole job: profile, score, allocate, apply, recover, measure, save."""

from __future__ import annotations

import dataclasses
import json
import shlex
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from layerwright.allocate import ALLOCATORS, pareto
from layerwright.core.calibration import Calibration, LossFunction
from layerwright.core.cost import Cost
from layerwright.core.errors import BudgetError
from layerwright.core.layer import LayerRef
from layerwright.core.memory import peak_memory_bytes
from layerwright.core.option import Option, OptionTable
from layerwright.core.plan import Plan
from layerwright.core.recipe import Recipe
from layerwright.core.records import ApplyReport
from layerwright.core.storage import stored_bytes
from layerwright.core.target import target as target_of
from layerwright.core.treatment import Treatments, describe, treatments_to_data, weight_treatments
from layerwright.recipes.bench import Bench, open_bench
from layerwright.recipes.job import Decision, decide, element_bytes, uniform_layers
from layerwright.recipes.kv_rows import uniform_budgets
from layerwright.recipes.measure import Measurement, measure
from layerwright.recipes.width import narrow_of, narrowed_ref, narrows, without_narrow
from layerwright.treat.apply import apply_plan
from layerwright.treat.export import export_model
from layerwright.treat.narrow import FeedForward, feed_forwards
from layerwright.treat.writer import check_folder, copy_side_files, save_model, staged_folder, write_json

__all__ = ["OptimizeResult", "optimize"]

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class OptimizeResult:
    """What the job did.

    Attributes:
        model: the treated model.
        plan: what was decided.
        decision: the table and the scores that it came from.
        report: what happened to each layer.
        measured: `before`, `after`, `uniform` (the uniform baseline at equal bytes).
        seconds: of the whole job.
        peak_memory_bytes: largest resident size of this process.
        checkpoint: folder of the saved model, None if it was not saved.
        data: what the HTML report shows.
    """

    model: nn.Module
    plan: Plan
    decision: Decision
    report: ApplyReport
    measured: Mapping[str, Measurement]
    seconds: float
    peak_memory_bytes: int
    checkpoint: Path | None = None
    data: Mapping[str, Any] = field(default_factory=dict)

    def to_data(self) -> dict[str, Any]:
        """The object that ``optimize --json`` prints."""
        out = self.checkpoint
        return {
            **{name: m.to_data() for name, m in self.measured.items()},
            "plan": str(out / "plan.yaml") if out else None,
            "report": str(out / "report.html") if out else None,
            "checkpoint": str(out) if out else None,
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
        }


def optimize(
    model: str | Path | nn.Module,
    budget: str,
    recipe: str | Path | Recipe | None = None,
    *,
    data: str | Path | Calibration | Iterable[Any] | None = None,
    loss_fn: LossFunction | None = None,
    target: str = "layerwright",
    out: str | Path | None = None,
    force: bool = False,
    seed: int = 0,
    samples: int = 128,
    length: int = 256,
    dtype: str | None = None,
    device: str = "cpu",
    uniform: bool = True,
    progress: Progress | None = None,
) -> OptimizeResult:
    """Make `model` fit `budget` with the least damage, and prove it.

    Args:
        model: a folder, hub name, ``demo:*`` or a module.
        budget: such as ``bits=3`` or ``size=0.25x,ms=0.8x``.
        recipe: name, YAML file or `Recipe`; by default `mixed` for bits, `squeeze_attention` for the cache, `joint` for
            everything else.
        data: calibration data; see `open_bench`.
        target: where the result must load.
        out: folder for checkpoint, plan, scores and report; nothing is written without it.
        uniform: also build and measure the uniform baseline of equal bytes.

    Raises:
        CheckError, InputError, FileNotFoundError: before anything is written.
    """
    begun = time.perf_counter()
    folder = check_folder(out, force=force, resume=False) if out is not None else None
    bench = open_bench(model, data, loss_fn=loss_fn, samples=samples, length=length, dtype=dtype, device=device)
    decision = decide(bench, budget, recipe, to=target, seed=seed, progress=progress)
    after, report = apply_plan(bench.model, decision.plan, bench.calibration, progress=progress)
    if decision.recipe.tuner:
        from layerwright.tune import TUNERS

        tuner = TUNERS.get(decision.recipe.tuner)
        after = tuner(after, bench.calibration, teacher=bench.model, seed=seed, **decision.recipe.tuner_settings)
    models = {"before": bench.model, "after": after}
    words = ""
    if uniform:
        width = element_bytes(bench, decision.refs)
        bound = min(decision.limits.get("bytes", decision.allocation.cost.bytes), decision.table.original.bytes)
        budgets, cache_words = uniform_budgets(
            decision.plan.layers, decision.profile, decision.limits, bench.calibration
        )
        layers: dict[str, Treatments] = {}
        if not budgets or any(weight_treatments(own) for own in decision.plan.layers.values()):
            fixed = _fixed(decision, width)
            layers, words = uniform_layers(decision.refs, bound, fixed, decision.recipe.group_size, width)
        layers |= budgets
        words = "; ".join(part for part in (words, cache_words) if part)
        models["uniform"], _ = apply_plan(bench.model, layers, bench.calibration, progress=progress)
    measured = measure(models, bench.heldout, byte_tokens=bench.name == "demo:lm", seed=seed)
    seconds = time.perf_counter() - begun
    arguments = ["--samples", str(samples), "--length", str(length)]
    arguments += ["--data", str(data)] if isinstance(data, str | Path) else []
    content = report_data(bench, decision, report, measured, words, seconds, arguments)
    if folder is not None:
        with staged_folder(folder, force) as temporary:
            _save(bench, decision, report, after, temporary, content)
    return OptimizeResult(
        after, decision.plan, decision, report, measured, seconds, peak_memory_bytes(), folder, content
    )


def _fixed(decision: Decision, element_bytes: int) -> Cost:
    """Everything that the uniform baseline does not store anew: all but the planned weights; biases stay."""
    weights = sum(ref.numel for ref in decision.refs) * element_bytes
    return Cost(bytes=decision.table.original.bytes - weights)


def _save(
    bench: Bench, decision: Decision, report: ApplyReport, after: nn.Module, folder: Path, content: Mapping[str, Any]
) -> None:
    form = target_of(decision.plan.target).format
    if form == "safetensors":
        save_model(after, folder, force=True)
    else:
        export_model(after, folder, form, processor=bench.processor, force=True)
    copy_side_files(bench.source.folder if bench.source else None, folder, bench.processor)
    decision.plan.save(folder / "plan.yaml")
    for scores in decision.scores.values():
        scores.save(folder / "scores")
    report.save(folder / "apply.jsonl")
    write_json(folder / "report.json", content)


def report_data(
    bench: Bench,
    decision: Decision,
    report: ApplyReport,
    measured: Mapping[str, Measurement],
    uniform_words: str,
    seconds: float,
    arguments: Sequence[str] = (),
) -> dict[str, Any]:
    """Everything the HTML report shows, as plain data."""
    import platform

    import torch
    import transformers

    command = shlex.join(
        f"layerwright optimize {bench.name} --budget {decision.plan.budget} --recipe {decision.recipe.name}".split()
        + f"--target {decision.target.name} --seed {decision.plan.seed} -o out".split()
        + list(arguments)
    )
    chosen = {path: option for option in decision.allocation.chosen for path in option.covers}
    records = {record.layer: record for record in report}
    width = element_bytes(bench, decision.refs)
    parts = feed_forwards(bench.model) if narrows(decision.recipe) else {}
    rows = []
    for row in decision.profile:
        ref = row.ref
        option = chosen.get(ref.path)
        treatments: Treatments = option.treatments if option else ()
        record = records.get(ref.path)
        rows.append(
            {
                "path": ref.path,
                "kind": ref.kind,
                "role": ref.role,
                "stack": ref.stack,
                "block": ref.block,
                "shape": list(ref.shape),
                "count": ref.count,
                "params": row.cost.params,
                "flops": row.cost.flops,
                "ms": row.cost.ms,
                "bytes_before": row.cost.bytes,
                "bytes_after": _bytes_after(option, ref, row.cost.bytes, parts, width),
                "planned": option is not None,
                "treatments": treatments_to_data(treatments),
                "label": describe(treatments) if option else "not planned",
                "damage": option.damage if option and len(option.covers) == 1 else None,
                "reason": decision.plan.reasons.get(ref.path, ""),
                "status": record.status if record else "skipped",
                "error": record.error if record else None,
                "tokens": record.tokens if record else 0,
                "note": record.note if record else "",
                "sensitivity": _sensitivity(decision, ref.path),
            }
        )
    return {
        "title": f"layerwright: {bench.name}",
        "model": bench.name,
        "architecture": type(bench.model).__name__,
        "budget": decision.plan.budget,
        "recipe": decision.recipe.name,
        "target": decision.target.name,
        "seed": decision.plan.seed,
        "calibration": repr(bench.calibration),
        "heldout": repr(bench.heldout),
        "measured": {name: m.to_data() for name, m in measured.items()},
        "uniform": uniform_words,
        "layers": rows,
        "predicted": {"bytes": decision.allocation.cost.bytes, "damage": decision.allocation.predicted},
        "limits": dict(decision.limits),
        # A decider leaves no table of damages to draw a frontier from.
        "pareto": [] if decision.recipe.decider else curve(decision.table),
        "uniform_curve": [] if decision.recipe.decider else curve(decision.table, "uniform"),
        "kinds": [] if decision.recipe.decider else single_kinds(decision),
        "plan": decision.plan.to_yaml(),
        "seconds": seconds,
        "peak_memory_bytes": peak_memory_bytes(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "command": command,
    }


def _bytes_after(
    option: Option | None, ref: LayerRef, before: float, parts: Mapping[str, FeedForward], element_bytes: int
) -> float:
    """Bytes of one layer under an option that may cover others too."""
    if option is None or not option.treatments:
        return before
    if _dropped(option):
        return 0.0
    if all(t.scope == "attention" for t in option.treatments):
        return before + option.cost.bytes  # what is stored beside the module; its weights are rows of their own
    if len(option.covers) == 1:
        return float(max(option.cost.bytes, 0.0))
    narrow, shape = narrow_of(option.treatments), ref
    bias = before - ref.numel * element_bytes
    if narrow is not None:
        part = parts[option.layer]
        shape = narrowed_ref(ref, part.neurons, narrow.kept(part.neurons))
        bias *= shape.shape[0] / ref.shape[0]
    return bias + stored_bytes(without_narrow(option.treatments), *shape.shape, ref.count, element_bytes)


def _dropped(option: Any) -> bool:
    return any(t.tag == "drop" for t in option.treatments)


def _sensitivity(decision: Decision, path: str) -> float | None:
    """Damage of the cheapest candidate of a layer: how much it hurts to squeeze it."""
    options = [o for o in decision.table.options if o.covers == (path,) and o.treatments]
    return min(options, key=lambda o: o.cost.bytes).damage if options else None


def single_kinds(decision: Decision) -> list[dict[str, Any]]:
    """Predicted damage at the same limits with one kind of treatment alone, and with all of them together."""
    tags = sorted({t.tag for option in decision.table.options for t in option.treatments})
    rows: list[dict[str, Any]] = [
        {"kind": "together", "damage": decision.allocation.damage, "bytes": decision.allocation.cost.bytes}
    ]
    for tag in tags if len(tags) > 1 else ():
        options = tuple(o for o in decision.table.options if all(t.tag == tag for t in o.treatments))
        table = dataclasses.replace(decision.table, options=options)
        try:
            found = ALLOCATORS.get("integer")(table, decision.limits, seed=decision.plan.seed)
        except BudgetError:
            rows.append({"kind": tag, "damage": None, "bytes": None})
            continue
        rows.append({"kind": tag, "damage": found.damage, "bytes": found.cost.bytes})
    return rows


def curve(table: OptionTable, allocator: str = "integer", points: int = 16) -> list[dict[str, float]]:
    """Predicted damage against bytes: the frontier of `allocator`; empty where only blocks are dropped and `uniform`
    has nothing to give.
    """
    if allocator == "uniform" and not any(t.scope == "weight" for o in table.options for t in o.treatments):
        return []
    return [
        {"bytes": a.cost.bytes, "damage": a.damage, "loss": (table.base_loss or 0.0) + a.damage}
        for a in pareto(table, "bytes", points=points, allocator=allocator)
    ]


def dump(result: OptimizeResult) -> str:
    """The result as JSON text."""
    return json.dumps(result.to_data(), indent=2)
