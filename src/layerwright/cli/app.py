"""All commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from layerwright.cli.console import emit, megabytes, progress_to, say, show_measurements, show_table
from layerwright.cli.options import (
    Budget,
    Data,
    Device,
    Dtype,
    Force,
    Json,
    Length,
    Model,
    Out,
    RecipeName,
    Samples,
    Seed,
    TargetName,
)
from layerwright.cli.paths import check_outputs

app = typer.Typer(
    name="layerwright",
    help="Engineer neural networks one layer at a time.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


def _auto(dtype: str) -> str | None:
    return None if dtype == "auto" else dtype


@app.callback()
def _root() -> None:
    pass


@app.command()
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


@app.command()
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
            dtype=_auto(dtype),
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


@app.command()
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
    bench = open_bench(model, data, samples=samples, length=length, dtype=_auto(dtype), device=device)
    with progress_to(json) as progress:
        decision = decide(bench, budget, recipe, to=target, seed=seed, scores_folder=scores, progress=progress)
    decision.plan.save(out)
    chosen = decision.allocation
    if json:
        emit(
            {
                "plan": str(out),
                "predicted": chosen.cost.to_data() | {"damage": chosen.damage},
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
        f"({chosen.cost.bytes / original.bytes:.3f}x), loss +{chosen.damage:.4g}; written to {out}"
    )


@app.command()
def apply(
    model: Model,
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="The plan file.")],
    out: Out,
    data: Data = None,
    whole: Annotated[bool, typer.Option("--whole", help="Load the model whole instead of block by block.")] = False,
    samples: Samples = 128,
    length: Length = 256,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    force: Force = False,
    json: Json = False,
) -> None:
    """Carry out a plan, block by block from the files; the same command resumes a run that was stopped.

    Example: `layerwright apply demo:lm plan.yaml -o out/lm`
    """
    from layerwright.recipes.apply import apply_job

    del seed
    with progress_to(json) as progress:
        result = apply_job(
            model,
            plan,
            out,
            data=data,
            whole=whole,
            samples=samples,
            length=length,
            device=device,
            dtype=_auto(dtype),
            force=force,
            progress=progress,
            say=lambda text: say(text, json),
        )
    if json:
        emit(result.to_data())
        return
    say(str(result.report))
    say(result.comparison())
    say(f"written to {out}")


@app.command()
def tune(
    model: Model,
    method: Annotated[
        str,
        typer.Option("--method", "-m", help="lora, full, distill, distill_layers, adaquant, renormalize, bias_tune."),
    ],
    out: Out,
    data: Data = None,
    teacher: Annotated[str | None, typer.Option("--teacher", help="The original model, for distillation.")] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Optimizer steps.")] = 100,
    rank: Annotated[int, typer.Option("--rank", min=1, help="LoRA rank.")] = 8,
    keep_adapter: Annotated[
        bool, typer.Option("--keep-adapter", help="Save the adapter alone instead of merging it.")
    ] = False,
    samples: Samples = 128,
    length: Length = 256,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    force: Force = False,
    json: Json = False,
) -> None:
    """Recover or adapt: train adapters or weights, with the original as teacher if there is one.

    Example: `layerwright tune out/lm --method distill --teacher demo:lm -o out/tuned`
    """
    from layerwright.recipes.tune import tune_job

    with progress_to(json) as progress:
        measured = tune_job(
            model,
            method,
            out,
            data=data,
            teacher=teacher,
            steps=steps,
            rank=rank,
            keep_adapter=keep_adapter,
            samples=samples,
            length=length,
            device=device,
            dtype=_auto(dtype),
            seed=seed,
            force=force,
            progress=progress,
        )
    if json:
        emit({name: m.to_data() for name, m in measured.items()} | {"checkpoint": str(out)})
        return
    show_measurements(measured)
    say(f"written to {out}")


@app.command()
def measure(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="Models to compare; the first is the reference.")
    ],
    data: Data = None,
    samples: Samples = 64,
    length: Length = 256,
    seconds: Annotated[float, typer.Option("--seconds", min=0.05, help="Time for each model and batch size.")] = 1.0,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Quality with a confidence interval, bytes, FLOPs, time and memory, side by side.

    Example: `layerwright measure demo:lm out/lm3`
    """
    from layerwright.recipes.tune import measure_job

    measured = measure_job(
        models, data, samples=samples, length=length, seconds=seconds, device=device, dtype=_auto(dtype), seed=seed
    )
    if json:
        emit({name: m.to_data() for name, m in measured.items()})
        return
    show_measurements(measured)


@app.command()
def export(
    model: Model,
    out: Out,
    format: Annotated[str, typer.Option("--format", "-f", help="safetensors, compressed-tensors, gguf, onnx.")],
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Write plain weights, for formats that lack the treatment.")
    ] = False,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    force: Force = False,
    json: Json = False,
) -> None:
    """Write a checkpoint in a form that other programs load.

    Example: `layerwright export out/lm3 --format compressed-tensors -o out/lm3-hf`
    """
    from layerwright.data.loading import load, locate
    from layerwright.treat.export import export_model
    from layerwright.treat.writer import copy_side_files

    del seed
    source = locate(model)
    network, processor = load(source, dtype=_auto(dtype), device=device)
    written = export_model(network, out, format, processor=processor, dequantize=dequantize, force=force)
    if written.is_dir():
        copy_side_files(source.folder, written, processor)
    if json:
        emit({"format": format, "path": str(written)})
        return
    say(f"written to {written}")


@app.command()
def optimize(
    model: Model,
    budget: Budget,
    out: Out,
    recipe: RecipeName = None,
    target: TargetName = "layerwright",
    data: Data = None,
    samples: Samples = 128,
    length: Length = 256,
    no_uniform: Annotated[bool, typer.Option("--no-uniform", help="Skip the uniform baseline.")] = False,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    force: Force = False,
    json: Json = False,
) -> None:
    """The whole job: profile, score, decide, apply, recover, measure, save, report.

    Example: `layerwright optimize demo:lm --budget bits=3 -o out/lm3`
    """
    from layerwright.recipes.check import check_job
    from layerwright.recipes.optimize import optimize as run
    from layerwright.report import write_report

    check_job(
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
        force=force,
    )
    with progress_to(json) as progress:
        result = run(
            model,
            budget,
            recipe,
            data=data,
            target=target,
            out=out,
            force=force,
            seed=seed,
            samples=samples,
            length=length,
            dtype=_auto(dtype),
            device=device,
            uniform=not no_uniform,
            progress=progress,
        )
    page = write_report(out)
    if json:
        emit(result.to_data())
        return
    show_measurements(result.measured)
    say(str(result.report))
    say(f"checkpoint {out}, plan {out / 'plan.yaml'}, {result.seconds:.0f} s")
    say(f"report: {page}")


@app.command()
def report(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Output folder of `optimize`.")],
    json: Json = False,
) -> None:
    """Write the HTML report of a finished job again: one page that works offline.

    Example: `layerwright report out/lm3`
    """
    from layerwright.report import write_report

    page = write_report(out)
    if json:
        emit({"report": str(page)})
        return
    say(str(page))


@app.command()
def recipes(json: Json = False) -> None:
    """All recipes: what each scores, how it decides, what it applies.

    Example: `layerwright recipes`
    """
    from layerwright.recipes.book import recipes as all_recipes

    found = all_recipes()
    if json:
        emit([item.to_data() for item in found])
        return
    rows = [[r.name, r.title, r.scorer, r.allocator, len(r.candidates) + r.drop_blocks, r.tuner or ""] for r in found]
    show_table("Recipes", ["name", "what it does", "scorer", "allocator", "kinds", "tuner"], rows, left=4)


@app.command()
def systems(json: Json = False) -> None:
    """The published systems that are parts of this bench, with the last verdict of each study.

    Example: `layerwright systems`
    """
    from layerwright.studies import list_systems

    found = list_systems()
    if json:
        emit([item.to_data() for item in found])
        return
    rows = [[s.slug, s.title, ", ".join(s.rooms), ", ".join(s.objects), s.verdict] for s in found]
    show_table("Systems", ["slug", "paper", "rooms", "objects", "verdict"], rows, left=5)


@app.command()
def study(
    slug: Annotated[str, typer.Argument(metavar="SLUG", help="A system's slug, or `all`.")],
    quick: Annotated[bool, typer.Option("--quick", help="A smaller form that takes seconds.")] = False,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Number of seeds.")] = 3,
    json: Json = False,
) -> int:
    """Run a system's experiment: claim, table, each check with its bound, verdict. Exit code 1 if it does not hold.

    Example: `layerwright study adaquant --quick`
    """
    from layerwright.studies import run_study, show_evidence, study_slugs

    slugs = study_slugs() if slug == "all" else [slug]
    found = []
    with progress_to(json) as progress:
        for name in slugs:
            evidence = run_study(name, quick=quick, seeds=seeds, progress=progress)
            found.append(evidence)
            if not json:
                show_evidence(evidence, show_table, say)
    if json:
        emit(found[0].to_data() if slug != "all" else [e.to_data() for e in found])
    return 0 if all(e.holds for e in found) else 1
