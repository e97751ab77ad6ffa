"""`layerwright shape`: how deep and how wide, at equal parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from layerwright.cli.console import emit, megabytes, progress_to, say, show_table
from layerwright.cli.options import Force, Json
from layerwright.cli.paths import check_outputs
from layerwright.core.errors import InputError

__all__ = ["shape"]


def shape(
    params: Annotated[str, typer.Option("--params", "-p", help="Weights of the blocks: 10M, 250k, 1e6.")],
    task: Annotated[
        str,
        typer.Option("--task", "-t", help="lm, mlm, classify, mae, supervised; or text or images with --objective."),
    ],
    objective: Annotated[str | None, typer.Option("--objective", help="next, masked or labels.")] = None,
    aspect: Annotated[
        str, typer.Option("--aspect", help="What varies: depth (with width), ffn, heads; several with commas.")
    ] = "depth",
    match: Annotated[
        str, typer.Option("--match", help="What is equal: params, or flops (operations for each token).")
    ] = "params",
    flops: Annotated[bool, typer.Option("--flops", help="The same as --match flops.")] = False,
    depths: Annotated[str | None, typer.Option("--depths", help="Layers, such as 2,4,8; proposed if left out.")] = None,
    head_dim: Annotated[int | None, typer.Option("--head-dim", min=2, help="Features of a head.")] = None,
    tolerance: Annotated[float, typer.Option("--tolerance", help="Share by which the budget may be missed.")] = 0.05,
    steps: Annotated[int, typer.Option("--steps", help="Training steps of each shape.")] = 100,
    batch: Annotated[int, typer.Option("--batch", help="Samples of a step.")] = 8,
    rate: Annotated[float, typer.Option("--rate", help="Learning rate of all shapes.")] = 2e-3,
    seeds: Annotated[int, typer.Option("--seeds", help="Runs of each shape; two or more tell noise.")] = 3,
    data: Annotated[
        Path | None, typer.Option("--data", "-d", help="Text (.txt, .jsonl, .parquet) or images (.npz, class folders).")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for shape.json, shape.html, runs.json.")
    ] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Compare depths and widths of equal parameters by training each briefly on the same data.

    Example: `layerwright shape --params 250k --task lm --steps 60 -o out/shapes`

    The same command goes on after an interruption; more `--seeds` or `--depths` train only what is missing.
    """
    from layerwright.recipes.shape import ShapeSettings, compare_shapes, parse_count

    if flops and match not in ("params", "flops"):
        raise InputError(f"match: got {match!r} and --flops, expected one of them")
    settings = ShapeSettings(
        params=parse_count(params),
        task=task,
        match="flops" if flops else match,
        aspect=tuple(part.strip() for part in aspect.split(",") if part.strip()),
        depths=_depths(depths),
        head_dim=head_dim,
        tolerance=tolerance,
        steps=steps,
        batch=batch,
        rate=rate,
        seeds=seeds,
        data=data,
    )
    check_outputs(folder=out)
    with progress_to(json) as progress:
        report = compare_shapes(
            settings, out, objective=objective, force=force, progress=progress, told=lambda text: say(text, quiet=json)
        )
    if out is not None:
        from layerwright.report.shape import write_shape

        write_shape(report, out / "shape.html")
    if json:
        emit(report.to_data())
        return
    places = {row.name: row for row in report.ranking}
    rows = []
    for row in report.rows:
        own = places.get(row["shape"])
        spread = f" ± {row['quality_spread']:.4f}" if row["quality_spread"] is not None else ""
        rows.append(
            [
                row["shape"],
                row["block_parameters"],
                row["parameters"],
                row["flops_per_token"],
                "failed" if row["quality"] is None else f"{row['quality']:.4f}{spread}",
                ""
                if own is None
                else f"{own.worse:.4f}" + (f" ± {own.interval:.4f}" if own.interval is not None else ""),
                f"{row['latency_ms']:.3g} ({row['relative_latency']:.2f}x)",
                round(row["tokens_per_second"]),
                megabytes(row["activation_bytes"]),
                row["hc_ratio"],
                row["token_cosine"],
            ]
        )
    columns = ["shape", "block weights", "parameters", "FLOPs/token", report.quality, "worse than the best", "ms"]
    show_table("Shapes", [*columns, "tokens/s", "activations", "hc", "cosine"], rows)
    near = [row.name for row in report.ranking if row.within_noise and row.worse > 0]
    say(f"best: {report.best}" + (f"; within noise of it: {'; '.join(near)}" if near else ""))
    if seeds < 2:
        say("one seed tells nothing of noise: give --seeds 2 or more")
    elif near:
        say(f"fastest of these: {report.fastest}")
    say(f"training took {report.seconds:.0f} s (forecast {report.forecast_seconds:.0f} s)")
    if out is not None:
        say(f"written to {out}: shape.json, shape.html, runs.json")


def _depths(text: str | None) -> tuple[int, ...] | None:
    """``2,4,8`` as numbers."""
    if text is None:
        return None
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError as error:
        raise InputError(f"depths: got {text!r}, expected numbers of layers such as 2,4,8") from error
