"""One small experiment for each published system: the executable evidence.

- `run_study(slug)`: measure a system's claims; returns an `Evidence`. `study_slugs`: all of them.
- `list_systems()`: the systems, their papers and parts, and the verdict of the last run.
- `show_evidence`: print claim, table, checks and verdict.
- `markdown_table()`: the systems as a table for the documentation.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from layerwright.core.errors import InputError
from layerwright.core.evidence import Evidence
from layerwright.studies.systems import SYSTEMS, System, list_systems, markdown_table, save_verdict, system

__all__ = ["System", "list_systems", "markdown_table", "run_study", "show_evidence", "study_slugs"]

Progress = Callable[[str, int, int], None]


def study_slugs() -> list[str]:
    """The slugs of all studies, sorted."""
    return sorted(item.slug for item in SYSTEMS)


def run_study(slug: str, *, quick: bool = False, seeds: int = 3, progress: Progress | None = None) -> Evidence:
    """Run the study of a system and keep its verdict for `list_systems`.

    Args:
        slug: as in `study_slugs`.
        quick: a smaller form that takes seconds.
        seeds: number of seeds, at least 1.
        progress: ``progress(what, done, total)``.

    Raises:
        InputError: an unknown slug (close matches are listed), or fewer than one seed.
    """
    known = system(slug).slug
    if seeds < 1:
        raise InputError(f"seeds: got {seeds}, expected at least 1")
    module = import_module(f"layerwright.studies.{known.replace('-', '_')}")
    begun = time.perf_counter()
    evidence: Evidence = module.run(quick=quick, seeds=seeds, progress=progress)
    if not evidence.seconds:
        evidence = dataclasses.replace(evidence, seconds=time.perf_counter() - begun)
    save_verdict(evidence, quick=quick)
    return evidence


def show_evidence(evidence: Evidence, show_table: Callable[..., None], say: Callable[[str], None]) -> None:
    """Print claim, table, each check as ``measured  bound  holds``, notes and verdict.

    Args:
        evidence: what a study measured.
        show_table: ``show_table(title, columns, rows, left=1)``.
        say: prints a line.
    """
    say(f"{evidence.slug}: {evidence.claim}")
    columns = list(dict.fromkeys(name for row in evidence.table for name in row))
    rows: Sequence[Sequence[Any]] = [[row.get(name) for name in columns] for row in evidence.table]
    if rows:
        show_table("Measured", columns, rows, left=1)
    checks = [
        [check.name, check.measured, f"{check.relation} {check.bound:.4g}", "yes" if check.holds else "no"]
        for check in evidence.checks
    ]
    show_table("Checks", ["check", "measured", "bound", "holds"], checks, left=1)
    for note in evidence.notes:
        say(f"note: {note}")
    say(f"verdict: {evidence.verdict} ({evidence.seconds:.0f} s, seeds {', '.join(map(str, evidence.seeds))})")
