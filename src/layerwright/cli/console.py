"""Tables, progress and JSON."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from layerwright.cli import interrupt

__all__ = ["emit", "megabytes", "progress_to", "say", "show_measurements", "show_table"]

_UNBOUNDED = 1_000_000
"""Columns of a console that is no terminal."""

_out = Console(highlight=False)
_err = Console(stderr=True, highlight=False)


def say(text: str, quiet: bool = False) -> None:
    """A line for people on standard output; nothing when `quiet`, where JSON goes there."""
    if not quiet:
        _out.print(text, markup=False, soft_wrap=True)


def emit(data: Any) -> None:
    """One JSON object on standard output."""
    print(json.dumps(data, indent=2, default=str))


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, left: int = 1) -> None:
    """A table; the first `left` columns are text.

    On a terminal it is folded into the width that there is. Elsewhere it is as wide as its cells ask, so that a row is
    a line for the program that reads it.
    """
    terminal = _out.is_terminal
    table = Table(title=title if terminal else None, title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < left else "right", overflow="fold")
    for row in rows:
        cells = (_text(cell) for cell in row)
        table.add_row(*(cells if terminal else (" ".join(cell.split()) for cell in cells)))
    if terminal:
        _out.print(table)
        return
    say(title)
    wide = Console(file=_out.file, width=_UNBOUNDED, highlight=False)
    wide.print(table, width=Measurement.get(wide, wide.options, table).maximum)


def _text(cell: Any) -> str:
    from rich.markup import escape

    if isinstance(cell, float):
        return f"{cell:.4g}"
    if isinstance(cell, int) and not isinstance(cell, bool):
        return f"{cell:,}"
    return "" if cell is None else escape(str(cell))


def megabytes(size: float) -> str:
    """``4.01 MB``."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size:.0f} B"


def show_measurements(measured: Mapping[str, Any]) -> None:
    """Models side by side, with the interval of the difference to the first."""
    rows = []
    for name, m in measured.items():
        low, high = m.difference_interval or m.loss_interval
        change = f"{m.difference:+.4f} [{low:+.4f}, {high:+.4f}]" if m.difference is not None else ""
        speeds = [f"{value:,.0f}" for value in m.speed.values()]
        accuracy = f"{m.accuracy:.2%}" if m.accuracy is not None else f"{m.perplexity:.3f}" if m.perplexity else ""
        rows.append(
            [
                name,
                f"{m.loss:.4f}",
                change,
                accuracy,
                megabytes(m.bytes),
                f"{m.flops / 1e6:,.1f}",
                f"{m.ms:.2f}",
                *speeds,
            ]
        )
    first = next(iter(measured.values()))
    quality = "accuracy" if first.accuracy is not None else "perplexity"
    unit = first.speed_unit.replace("_per_second", "/s")
    columns = [
        "",
        f"loss ({first.unit})",
        "change [95 %]",
        quality,
        "size",
        "MFLOPs",
        "ms",
        *(f"{unit} batch {b}" for b in first.speed),
    ]
    show_table("Held out", columns, rows)


@contextmanager
def progress_to(quiet: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """A progress callback: bars on a terminal, plain lines otherwise (at most one every two seconds)."""
    if quiet:
        yield _stopping(lambda _name, _done, _total: None)
        return
    if not _err.is_terminal:
        yield _stopping(_plain_lines())
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=_err, transient=True) as bars:
        task = bars.add_task("starting", total=None)
        yield _stopping(lambda name, done, total: bars.update(task, description=name[:48], completed=done, total=total))


def _stopping(show: Callable[[str, int, int], None]) -> Callable[[str, int, int], None]:
    """Progress is also where a run stops whose Ctrl-C was dropped by native code."""

    def step(name: str, done: int, total: int) -> None:
        interrupt.current.stop_if_seen()
        show(name, done, total)

    return step


def _plain_lines() -> Callable[[str, int, int], None]:
    last = [0.0]

    def line(name: str, done: int, total: int) -> None:
        if time.monotonic() - last[0] > 2 or done == total:
            last[0] = time.monotonic()
            print(f"{name}: {done}/{total}", file=sys.stderr, flush=True)

    return line
