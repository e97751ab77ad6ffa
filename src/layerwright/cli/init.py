"""`layerwright init`: a model whose every layer starts with unit variance on real data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from layerwright.cli.console import emit, say, show_table
from layerwright.cli.options import Data, Device, Dtype, Force, Json, Length, Model, Samples, Seed, own_dtype

__all__ = ["init"]


def init(
    model: Model,
    data: Data = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for the checkpoint; none: show only.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Build from config.json with new random weights.")] = False,
    layers: Annotated[list[str] | None, typer.Option("--layers", help="Only layers like this pattern; repeat.")] = None,
    exclude: Annotated[list[str] | None, typer.Option("--exclude", help="No layers like this pattern; repeat.")] = None,
    tol: Annotated[float, typer.Option("--tol", help="How far from 1 a variance may be.")] = 0.1,
    max_iter: Annotated[int, typer.Option("--max-iter", min=1, help="Divisions of a layer at most.")] = 10,
    keep_weights: Annotated[bool, typer.Option("--keep-weights", help="Scale the weights that are there.")] = False,
    samples: Samples = 128,
    length: Length = 128,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    force: Force = False,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Start a model anew: orthonormal weights, scaled layer by layer to outputs of unit variance (LSUV).

    Example: `layerwright init demo:lm --fresh --exclude lm_head -o out/started`
    """
    from layerwright.cli.paths import check_outputs
    from layerwright.recipes.initialise import initialise

    if out is not None:
        check_outputs(folder=out)
    done = initialise(
        model,
        data,
        out,
        fresh=fresh,
        samples=samples,
        length=length,
        layers=layers or (),
        exclude=exclude or (),
        tol=tol,
        max_iter=max_iter,
        orthonormal=not keep_weights,
        device=device,
        dtype=own_dtype(dtype),
        seed=seed,
        force=force,
    )
    if json:
        emit({"out": None if out is None else str(out), **done.report.to_data()})
        return
    rows = [[r.name, r.var_before, r.var_after, r.tries, r.scale, r.note] for r in done.report.rows]
    show_table("layers in the order in which they run", ["layer", "variance", "after", "tries", "scale", "note"], rows)
    left = sum(not row.converged and not row.note for row in done.report.rows)
    say(f"{left} layers are further than {tol:g} from unit variance" if left else "every layer is within the tolerance")
    if done.folder is not None:
        say(f"written to {done.folder}")
