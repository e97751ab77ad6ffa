"""`layerwright place`: which layer of a served language model runs on which processor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from layerwright.cli.console import emit, megabytes, progress_to, say, show_table
from layerwright.cli.options import Json, Seed
from layerwright.cli.paths import check_outputs

__all__ = ["place"]


def place(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="mixtral, glam, grok1, opt-66b, llama3-70b, a folder in the Hugging Face layout, its config.json, a "
            "hub name, or demo:lm.",
        ),
    ],
    device: Annotated[
        str,
        typer.Option(
            "--device",
            help="h100, duplex, bank_pim, bankgroup_pim, hetero, duplex_split, or a YAML file that describes one.",
        ),
    ] = "duplex",
    batch: Annotated[int, typer.Option("--batch", min=1, help="Requests that may run at once.")] = 64,
    context: Annotated[int, typer.Option("--context", min=1, help="Mean prompt length in tokens.")] = 1024,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=1, help="Mean tokens of an answer.")] = 1024,
    requests: Annotated[
        Path | None,
        typer.Option("--requests", help="Trace, .csv or .jsonl with arrival (seconds), prompt, new (tokens)."),
    ] = None,
    rate: Annotated[
        float | None, typer.Option("--rate", help="Poisson arrivals per second; a closed loop if left out.")
    ] = None,
    number: Annotated[int, typer.Option("--number", min=1, help="Requests to serve with --rate.")] = 256,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Stages of the closed loop.")] = 500,
    devices: Annotated[int | None, typer.Option("--devices", min=1, help="Devices; by default as few as fit.")] = None,
    nodes: Annotated[int | None, typer.Option("--nodes", min=1, help="Nodes; by default of at most 8 devices.")] = None,
    policy: Annotated[
        str, typer.Option("--policy", help="auto, gpu, duplex, duplex+pe, duplex+pe+et, fastest, hetero.")
    ] = "auto",
    compare: Annotated[
        str,
        typer.Option(
            "--compare",
            help="Systems, comma separated: gpu, 2xgpu, pim, hetero, split, a policy, a device; '' for none.",
        ),
    ] = "gpu",
    efficiency: Annotated[
        str | None,
        typer.Option("--efficiency", help="Share of the peaks that is reached: 0.8, or 0.7,0.85 for high and low."),
    ] = None,
    skew: Annotated[float, typer.Option("--skew", help="Zipf exponent over the experts; 0 is uniform.")] = 0.0,
    strict_memory: Annotated[
        bool, typer.Option("--strict-memory", help="Refuse a batch whose cache does not fit instead of reducing it.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for report.html, place.yaml and results.json.")
    ] = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Which layer runs on which processor of a device, and what that gains in serving: a model, not a measurement.

    Example: `layerwright place mixtral --device duplex --batch 64 --context 1024 --compare gpu,pim -o out/place`
    """
    from layerwright.recipes.place import Load, place_job, save_place
    from layerwright.report.place import write_place_report

    check_outputs(folder=out)
    load = Load(
        batch=batch,
        prompt=context,
        new=new_tokens,
        rate=rate,
        trace=None if requests is None else str(requests),
        number=number,
        steps=steps,
    )
    with progress_to(json) as progress:
        result = place_job(
            model,
            device,
            load,
            n_devices=devices,
            nodes=nodes,
            policy=policy,
            compare=[name.strip() for name in compare.split(",") if name.strip()],
            efficiency=_efficiency(efficiency),
            strict_memory=strict_memory,
            skew=skew,
            seed=seed,
            progress=progress,
        )
    if out is not None:
        save_place(result, out)
        write_place_report(result.to_data(), out)
    if json:
        emit(result.to_data())
        return
    rows = [
        [
            kind.stage,
            kind.kind,
            kind.layers,
            f"{kind.op_per_byte:.1f}",
            f"{kind.flops / 1e9:,.2f}",
            megabytes(kind.bytes),
            f"{kind.high_seconds * 1e3:.3g}",
            "" if kind.low_seconds is None else f"{kind.low_seconds * 1e3:.3g}",
            kind.processor,
        ]
        for kind in result.kinds
    ]
    title = f"{result.shape.name} on {result.n_devices} x {result.device.name}, one device, {result.policy}"
    columns = ["stage", "layers", "number", "Op/B", "GFLOP", "bytes", "ms high", "ms low", "runs on"]
    show_table(title, columns, rows, left=2)
    served = [
        [
            name,
            f"{report.throughput:,.0f}",
            f"{report.tbt.p50 * 1e3:.2f}",
            f"{report.tbt.p99 * 1e3:.2f}",
            f"{report.t2ft.p50 * 1e3:.1f}",
            report.batch,
            f"{result.gain(name):.2f}x" if name != result.system else "",
        ]
        for name, report in result.reports.items()
    ]
    names = ["system", "tokens/s", "TBT ms", "TBT p99 ms", "first token ms", "batch", f"{result.system} against it"]
    show_table(str(load), names, served, left=1)
    for name, report in result.reports.items():
        for line in report.warnings:
            say(f"warning: {name}: {line}")
    for name, reason in result.skipped.items():
        say(f"skipped: {name}: {reason}")
    if out is not None:
        say(f"written to {out}: report.html, place.yaml, results.json")


def _efficiency(text: str | None) -> tuple[float, float] | None:
    from layerwright.core.errors import InputError

    if text is None:
        return None
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        shares = []
    if len(shares) not in (1, 2) or not all(0 < share <= 1 for share in shares):
        raise InputError(f"efficiency: got {text!r}, expected a share above 0 up to 1, or two such as 0.7,0.85")
    return shares[0], shares[-1]
