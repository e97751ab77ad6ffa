"""One small experiment for each published system: the executable evidence.

- `run_study(slug)`: measure a system's claims; returns an `Evidence`. `study_slugs`: all of them.
- `run_studies(slugs, jobs=...)`: several, side by side in processes of their own.
- `list_systems()`: the systems, their papers and parts, and the verdict of the last run.
- `show_evidence`: print claim, table, checks and verdict.
- `markdown_table()`: the systems as a table for the documentation.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib import import_module
from multiprocessing import get_context
from typing import Any

import torch

from layerwright.core.errors import InputError
from layerwright.core.evidence import Evidence
from layerwright.studies.systems import SYSTEMS, System, list_systems, markdown_table, save_verdict, system

__all__ = ["System", "list_systems", "markdown_table", "run_studies", "run_study", "show_evidence", "study_slugs"]

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
    evidence = _measured(_known(slug, seeds), quick, seeds, progress)
    save_verdict(evidence, quick=quick)
    return evidence


def run_studies(
    slugs: Sequence[str], *, jobs: int = 1, quick: bool = False, seeds: int = 3, progress: Progress | None = None
) -> Iterator[Evidence]:
    """Run several studies and give each evidence as soon as it is there; verdicts are kept as by `run_study`.

    Args:
        slugs: as in `study_slugs`.
        jobs: processes, which share the threads that PyTorch has here; with 1 the studies run in this one, in order.
        quick, seeds: as for `run_study`.
        progress: as for `run_study`; with several processes it counts studies.

    Raises:
        InputError: an unknown slug, or a number below 1; before anything runs.
    """
    if jobs < 1:
        raise InputError(f"jobs: got {jobs}, expected at least 1")
    known = [_known(slug, seeds) for slug in slugs]
    return _runs(known, jobs, quick, seeds, progress)


def _runs(known: Sequence[str], jobs: int, quick: bool, seeds: int, progress: Progress | None) -> Iterator[Evidence]:
    if jobs == 1:
        for slug in known:
            yield run_study(slug, quick=quick, seeds=seeds, progress=progress)
        return
    threads = max(1, torch.get_num_threads() // jobs)
    workers = ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (threads,))
    with workers:
        running = [workers.submit(_measured, slug, quick, seeds, None) for slug in known]
        try:
            for done, future in enumerate(as_completed(running), 1):
                evidence = future.result()
                save_verdict(evidence, quick=quick)
                if progress:
                    progress("studies", done, len(known))
                yield evidence
        finally:
            workers.shutdown(wait=False, cancel_futures=True)


def _known(slug: str, seeds: int) -> str:
    known = system(slug).slug
    if seeds < 1:
        raise InputError(f"seeds: got {seeds}, expected at least 1")
    return known


def _measured(known: str, quick: bool, seeds: int, progress: Progress | None) -> Evidence:
    module = import_module(f"layerwright.studies.{known.replace('-', '_')}")
    begun = time.perf_counter()
    evidence: Evidence = module.run(quick=quick, seeds=seeds, progress=progress)
    if not evidence.seconds:
        evidence = dataclasses.replace(evidence, seconds=time.perf_counter() - begun)
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
