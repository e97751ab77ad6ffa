"""Commands that look and decide: nothing of the model is changed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from layerwright.cli.console import emit, megabytes, progress_to, say, show_table
from layerwright.cli.options import (
    Budget,
    Data,
    Device,
    Dtype,
    Json,
    Length,
    Model,
    RecipeName,
    Samples,
    Seed,
    TargetName,
    own_dtype,
)
from layerwright.cli.paths import check_outputs

if TYPE_CHECKING:
    from layerwright.recipes.job import Decision

__all__ = ["check", "inspect", "plan"]


def check(
    model: Model,
    budget: Budget,
    recipe: RecipeName = None,
    target: TargetName = "layerwright",
    data: Data = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Output folder, to check that it can be used.")
    ] = None,
    samples: Samples = 128,
    length: Length = 256,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """What would fail, and what it would take: nothing is loaded or written.

    Example: `layerwright check demo:lm --budget bits=3`
    """
    from layerwright.recipes.check import check_job

    forecast = check_job(
        model,
        budget,
        recipe,
        target=target,
        data=data,
        out=out,
        samples=samples,
        length=length,
        device=device,
        dtype=dtype,
    )
    del seed
    if json:
        emit({"ok": True, "forecast": forecast.to_data()})
        return
    say(f"{model}: nothing stands in the way of {budget}")
    say(str(forecast))


def inspect(
    model: Model,
    data: Data = None,
    scores: Annotated[str, typer.Option("--scores", help="Scorers to run, comma separated; `all` for all.")] = "",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for the scores and the table.")] = None,
    samples: Samples = 32,
    length: Length = 256,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """The per-layer table: what every layer is, costs, and how much it matters.

    Example: `layerwright inspect demo:lm --scores fisher,similarity -o scores/`
    """
    from layerwright.recipes.inspect import inspect_model

    check_outputs(folder=out)
    with progress_to(json) as progress:
        profile, found = inspect_model(
            model,
            data,
            scores=[name.strip() for name in scores.split(",") if name.strip()],
            samples=samples,
            length=length,
            device=device,
            dtype=own_dtype(dtype),
            seed=seed,
            progress=progress,
        )
    if out is not None:
        for item in found.values():
            item.save(out)
        from layerwright.treat.writer import write_json

        write_json(out / "profile.json", {"total": profile.total.to_data(), "layers": profile.to_data()})
    if json:
        emit(
            {"model": profile.name, "loss": profile.loss, "total": profile.total.to_data(), "layers": profile.to_data()}
        )
        return
    names = sorted({name for row in profile for name in row.scores})
    rows = [
        [
            row.ref.path,
            row.ref.kind,
            "x".join(map(str, row.ref.shape)) if row.ref.parameter else "",
            int(row.cost.params),
            megabytes(row.cost.bytes),
            f"{row.cost.flops / 1e6:,.1f}",
            f"{row.cost.ms:.3f}",
            int(row.cost.kv_bytes_per_token) or "",
            *(row.scores.get(name) for name in names),
        ]
        for row in profile
    ]
    show_table(
        str(profile), ["layer", "kind", "shape", "params", "size", "MFLOPs", "ms", "KV B/token", *names], rows, left=3
    )


def plan(
    model: Model,
    budget: Budget,
    recipe: RecipeName = None,
    target: TargetName = "layerwright",
    scores: Annotated[
        Path | None, typer.Option("--scores", help="Folder of saved scores: reused if they fit, else filled.")
    ] = None,
    data: Data = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The plan to write.")] = Path("plan.yaml"),
    samples: Samples = 128,
    length: Length = 256,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Decide a treatment for every layer under a budget, and write the plan: YAML that a person can edit.

    Example: `layerwright plan demo:lm --budget size=0.25x,ms=0.8x -o plan.yaml`
    """
    from layerwright.core.treatment import describe, treatments_to_data
    from layerwright.recipes.bench import open_bench
    from layerwright.recipes.check import check_job
    from layerwright.recipes.job import decide

    check_outputs(file=out, folder=scores)
    check_job(
        model, budget, recipe, target=target, data=data, samples=samples, length=length, device=device, dtype=dtype
    )
    bench = open_bench(model, data, samples=samples, length=length, dtype=own_dtype(dtype), device=device)
    with progress_to(json) as progress:
        decision = decide(bench, budget, recipe, to=target, seed=seed, scores_folder=scores, progress=progress)
    decision.plan.save(out)
    chosen = decision.allocation
    if json:
        emit(
            {
                "plan": str(out),
                "predicted": chosen.cost.to_data() | {"damage": chosen.predicted},
                "limits": dict(decision.limits),
                "optimal": chosen.optimal,
                "layers": {path: treatments_to_data(t) for path, t in decision.plan.layers.items()},
                "reasons": dict(decision.plan.reasons),
            }
        )
        return
    rows = [[path, describe(t), decision.plan.reasons.get(path, "")] for path, t in decision.plan.layers.items()]
    show_table(
        f"{model} at {decision.plan.budget}, recipe {decision.recipe.name}", ["layer", "treatment", "why"], rows, left=3
    )
    original = decision.table.original
    say(
        f"predicted: {megabytes(chosen.cost.bytes)} of {megabytes(original.bytes)} "
        f"({chosen.cost.bytes / original.bytes:.3f}x){_rise(decision)}; written to {out}"
    )


def _rise(decision: Decision) -> str:
    """The predicted damage, in the units that it has; nothing where the method predicts none."""
    damage, scores = decision.allocation.predicted, decision.scores.get("layers")
    if damage is None:
        return ""
    in_loss = scores is None or scores.meta.get("loss_units", True)
    return f", loss +{damage:.4g}" if in_loss else f", score {damage:.4g} (not in units of the loss)"
