"""Commands that write a changed model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from layerwright.cli.console import emit, progress_to, say, show_measurements
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
    own_dtype,
)

__all__ = ["apply", "export", "optimize", "tune"]


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
            dtype=own_dtype(dtype),
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


def tune(
    model: Model,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            "-m",
            help="lora, adamole, full, distill, distill_layers, window, dlo, acm, peer, cost_eff, subtuning, adaquant, renormalize, bias_tune.",
        ),
    ],
    out: Out,
    data: Data = None,
    teacher: Annotated[str | None, typer.Option("--teacher", help="The original model, for distillation.")] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Optimizer steps.")] = 100,
    rank: Annotated[int, typer.Option("--rank", min=1, help="LoRA rank.")] = 8,
    keep_adapter: Annotated[
        bool, typer.Option("--keep-adapter", help="Save the adapter alone instead of merging it.")
    ] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A further setting of the method; may come several times."),
    ] = None,
    samples: Samples = 128,
    length: Length = 256,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    force: Force = False,
    json: Json = False,
) -> None:
    """Recover or adapt: train adapters or weights, with the original as teacher if there is one.

    Under `torchrun` or `accelerate launch` the processes train together.

    Example: `layerwright tune out/lm --method distill --teacher demo:lm -o out/tuned`
    """
    from layerwright.cli.settings import read_settings
    from layerwright.cli.subtuning import show_subtuning
    from layerwright.core.processes import main_process
    from layerwright.recipes.tune import tune_job

    settings = read_settings(set_ or [])
    alone = main_process()
    with progress_to(json or not alone) as progress:
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
            dtype=own_dtype(dtype),
            seed=seed,
            force=force,
            progress=progress,
            settings=settings,
        )
    if not alone:
        return
    if json:
        emit({name: m.to_data() for name, m in measured.items()} | {"checkpoint": str(out)})
        return
    if method == "subtuning":
        show_subtuning(out)
    show_measurements(measured)
    say(f"written to {out}")


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
    network, processor = load(source, dtype=own_dtype(dtype), device=device)
    written = export_model(network, out, format, processor=processor, dequantize=dequantize, force=force)
    if written.is_dir():
        copy_side_files(source.folder, written, processor)
    if json:
        emit({"format": format, "path": str(written)})
        return
    say(f"written to {written}")


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
            dtype=own_dtype(dtype),
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
