"""`layerwright bench-mq`: measured bit vectors, proxies held against them, and the search for a better proxy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from layerwright.cli.console import emit, progress_to, say, show_table
from layerwright.cli.options import Data, Json, Model, Seed
from layerwright.cli.paths import check_outputs

__all__ = ["bench_mq"]


def bench_mq(
    model: Model,
    build: Annotated[
        int | None,
        typer.Option("--build", min=10, help="Measure this many random bit vectors and write them to --out."),
    ] = None,
    widths: Annotated[str, typer.Option("--widths", help="Weight bits of the vectors, comma separated.")] = "2,3,4",
    bench: Annotated[
        Path | None, typer.Option("--bench", help="A table that --build wrote; by default the one of the demo model.")
    ] = None,
    proxy: Annotated[
        list[str] | None,
        typer.Option(
            "--proxy", "-p", help="emq, a hand-made one, an expression, or a file; repeatable. All by default."
        ),
    ] = None,
    search: Annotated[
        int | None, typer.Option("--search", min=1, help="Evolve a proxy for so many iterations; --out keeps it.")
    ] = None,
    also: Annotated[
        list[str] | None, typer.Option("--also", help="Another demo model the searched proxy must serve; repeatable.")
    ] = None,
    structure: Annotated[str, typer.Option("--structure", help="linear, tree or dag.")] = "tree",
    inputs: Annotated[
        str | None, typer.Option("--inputs", help="Statistics to search over, such as G,W,V; A,G,W,H,V,GW by default.")
    ] = None,
    population: Annotated[int, typer.Option("--population", min=4, help="Proxies in the population.")] = 50,
    top: Annotated[float, typer.Option("--top", help="Share of the best vectors that the search looks at.")] = 1.0,
    state: Annotated[
        Path | None, typer.Option("--state", help="File to keep the search in; the same command goes on from it.")
    ] = None,
    engine: Annotated[str, typer.Option("--engine", help="serial, processes or ray.")] = "serial",
    workers: Annotated[int, typer.Option("--workers", min=1, help="Processes of the search.")] = 1,
    data: Data = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="JSON file to write.")] = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Rank proxies of bit vectors against measured losses; measure such a table, or search a proxy on one.

    Example: `layerwright bench-mq demo:cnn --search 300 -o proxy.json`
    """
    from layerwright.core.errors import InputError
    from layerwright.recipes.bench_mq_job import bench_job, proxy_job, search_job

    if build is not None and (search is not None or out is None):
        raise InputError("--build needs --out, the file for the table, and goes without --search")
    check_outputs(file=out)
    check_outputs(file=state)
    with progress_to(json) as progress:
        if build is not None:
            table = bench_job(model, data, count=build, widths=widths, seed=seed, out=out, progress=progress)
            losses = sorted(table.records.values())
            measured = {
                "vectors": len(table),
                "base": table.base,
                "best": losses[0],
                "worst": losses[-1],
                "out": str(out),
            }
        elif search is not None:
            found, rows = search_job(
                model,
                data,
                bench,
                iterations=search,
                structure=structure,
                also=also or (),
                inputs=inputs,
                population=population,
                top=top,
                state=state,
                engine=engine,
                workers=workers,
                seed=seed,
                out=out,
                progress=progress,
            )
        else:
            rows = proxy_job(model, data, bench, proxy or (), seed=seed)
    if build is not None:
        if json:
            emit(measured)
        else:
            say(f"{build} bit vectors: {losses[0]:.4f} to {losses[-1]:.4f} {table.metric}, untouched {table.base:.4f}")
        return
    if json:
        ranks = {name: {str(t): _number(v) for t, v in row.items()} for name, row in rows.items()}
        emit({"found": found.to_data() if search is not None else None, "correlations": ranks})
        return
    if search is not None:
        say(f"found: {found.best} ({', '.join(f'{count} {how}' for how, count in found.counts.items())})")
    _show(rows)


def _show(rows: Mapping[str, Mapping[float, float]]) -> None:
    columns = ["proxy", *(f"best {top:.0%}" for top in next(iter(rows.values())))]
    shown = [[name, *(None if _number(v) is None else f"{v:.3f}" for v in row.values())] for name, row in rows.items()]
    show_table("Spearman's correlation with measured losses", columns, shown, left=1)


def _number(value: float) -> float | None:
    """None for NaN, which JSON does not have."""
    return value if math.isfinite(value) else None
