"""`layerwright depth`: what each block of a model does for its depth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from layerwright.cli.console import emit, progress_to, say, show_table
from layerwright.cli.options import Data, Device, Dtype, Json, Length, Samples, Seed, own_dtype

__all__ = ["depth"]


def depth(
    models: Annotated[list[str], typer.Argument(metavar="MODEL [MODEL ...]", help="Folders, hub names or demo:*.")],
    data: Data = None,
    page: Annotated[Path | None, typer.Option("--out", "-o", help="Write a page with the curves (.html).")] = None,
    drops: Annotated[bool, typer.Option("--drops/--no-drops", help="Measure the loss without each block.")] = True,
    samples: Samples = 16,
    length: Length = 128,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Show how much each block changes the residual stream, and what the loss is without it.

    Example: `layerwright depth demo:lm -o depth.html`
    """
    from layerwright.recipes.bench import open_bench
    from layerwright.recipes.depth_profile import profile_depth

    profiles = []
    with progress_to(json) as progress:
        for number, model in enumerate(models):
            bench = open_bench(model, data, samples=samples, length=length, dtype=own_dtype(dtype), device=device)
            profiles.append(profile_depth(bench, samples, drops=drops, seed=seed))
            progress(f"depth of {model}", number + 1, len(models))
    if page is not None:
        from layerwright.report.depth import write_depth

        write_depth(profiles, page)
    if json:
        emit([profile.to_data() for profile in profiles])
        return
    for profile in profiles:
        rows = [[b.block, b.variance, b.angle, b.missed, b.gap] for b in profile.blocks]
        columns = ["block", "variance after it", "turn", f"loss without it ({profile.unit})", "from the identity"]
        show_table(profile.model, columns, rows)
    if page is not None:
        say(f"written to {page}")
