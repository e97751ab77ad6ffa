"""Commands that measure, show and list."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from layerwright.cli.console import emit, progress_to, say, show_measurements, show_table
from layerwright.cli.options import (
    Data,
    Device,
    Dtype,
    Json,
    Length,
    Samples,
    Seed,
    own_dtype,
)

__all__ = ["measure", "recipes", "report", "study", "systems"]


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
        models, data, samples=samples, length=length, seconds=seconds, device=device, dtype=own_dtype(dtype), seed=seed
    )
    if json:
        emit({name: m.to_data() for name, m in measured.items()})
        return
    show_measurements(measured)


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


def study(
    slugs: Annotated[list[str], typer.Argument(metavar="SLUG...", help="Slugs of systems, or `all`.")],
    quick: Annotated[bool, typer.Option("--quick", help="A smaller form that takes seconds.")] = False,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Number of seeds.")] = 3,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Studies that run side by side.")] = 1,
    json: Json = False,
) -> int:
    """Run a system's experiment: claim, table, each check with its bound, verdict. Exit code 1 if it does not hold.

    Example: `layerwright study adaquant --quick`
    """
    from layerwright.studies import run_studies, show_evidence, study_slugs

    names = study_slugs() if "all" in slugs else list(dict.fromkeys(slugs))
    found = []
    with progress_to(json) as progress:
        for evidence in run_studies(names, jobs=jobs, quick=quick, seeds=seeds, progress=progress):
            found.append(evidence)
            if not json:
                show_evidence(evidence, show_table, say)
    if json:
        emit(found[0].to_data() if len(slugs) == 1 and slugs != ["all"] else [e.to_data() for e in found])
    elif len(found) > 1:
        rows = [[e.slug, sum(c.holds for c in e.checks), len(e.checks), e.verdict, e.seconds] for e in found]
        show_table("Studies", ["study", "hold", "checks", "verdict", "seconds"], rows, left=1)
    return 0 if all(e.holds for e in found) else 1
