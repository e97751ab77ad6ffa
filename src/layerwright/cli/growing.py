"""`layerwright grow`: a better network by growing a trained one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from layerwright.cli.console import emit, progress_to, say, show_table
from layerwright.cli.options import Force, Json, Out, Seed
from layerwright.cli.paths import check_outputs

__all__ = ["grow"]


def grow(
    start: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|SPEC",
            help="Words such as conv8,conv8,pool,conv16-5,fc16 (g4,g4,t,g6 for a DenseNet), or a folder of `grow`.",
        ),
    ],
    out: Out,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data", "-d", help="Images: .npz with x and y, or a folder of class folders; digits if left out."
        ),
    ] = None,
    episodes: Annotated[int, typer.Option("--episodes", min=1, help="Episodes of the search.")] = 6,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Networks in an episode.")] = 6,
    wider: Annotated[int, typer.Option("--wider", min=0, help="Times that layers of each get wider.")] = 2,
    deeper: Annotated[int, typer.Option("--deeper", min=0, help="Layers inserted into each.")] = 2,
    epochs: Annotated[int, typer.Option("--epochs", min=0, help="Epochs before a candidate is judged.")] = 4,
    start_epochs: Annotated[int, typer.Option("--start-epochs", min=0, help="Epochs of the start network.")] = 15,
    final_epochs: Annotated[int, typer.Option("--final-epochs", min=0, help="More epochs for the best one.")] = 15,
    random: Annotated[bool, typer.Option("--random", help="Random search, for comparison.")] = False,
    force: Force = False,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Search a better convolutional network: grow a trained one, whose function every candidate inherits.

    Example: `layerwright grow conv4,conv4,pool,conv8,fc16 --episodes 4 -o out/grown`

    The same command goes on after an interruption; with more `--episodes` it searches further.
    """
    from layerwright.recipes.grow_job import grow_job

    check_outputs(folder=out)
    with progress_to(json) as progress:
        job = grow_job(
            start,
            data,
            out,
            episodes=episodes,
            batch=batch,
            wider=wider,
            deeper=deeper,
            epochs=epochs,
            start_epochs=start_epochs,
            final_epochs=final_epochs,
            random=random,
            seed=seed,
            force=force,
            progress=progress,
        )
    if json:
        emit(job.to_data())
        return
    rows = [
        [row["network"], ",".join(row["spec"]), row["parameters"], f"{row['validation']:.2%}", f"{row['test']:.2%}"]
        for row in job.rows
    ]
    show_table("Networks", ["", "layers", "parameters", "validation", "test"], rows, left=2)
    trace = [[e.number + 1, f"{e.mean:.2%}", f"{max(e.scores):.2%}"] for e in job.result.episodes]
    show_table("Episodes", ["episode", "mean", "best"], trace, left=1)
    say(f"{len(job.result.pool)} networks judged; written to {out}: architecture.json, model.safetensors, results.json")
