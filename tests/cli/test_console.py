"""Tables: folded on a terminal, a line a row elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

Said = Callable[..., str]


def parsed(text: str) -> Any:
    """`text` as JSON, and nothing around it."""
    return json.loads(text)


def test_a_row_is_a_line_where_the_output_is_no_terminal(said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = said("recipes").splitlines()
    names = [item["name"] for item in parsed(said("recipes", "--json"))]
    rows = [line for line in lines if line.startswith("│")]
    assert len(rows) == len(names)  # no row is folded
    assert [row.split("│")[1].strip() for row in rows] == names
    assert len({len(line) for line in lines[1:]}) == 1 and len(lines[1]) > 80
    assert not any(line != line.rstrip() for line in lines)


def test_tables_are_folded_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    from layerwright.cli import console

    monkeypatch.setattr(console, "_out", Console(width=40, force_terminal=True, color_system=None))
    console.show_table("A title", ["name", "words"], [["a", "many words " * 20], ["b", "more\nlines"]], left=2)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 10 and all(len(line) <= 40 for line in lines)


def test_a_line_break_in_a_cell_does_not_break_the_row(capsys: pytest.CaptureFixture[str]) -> None:
    from layerwright.cli import console

    console.show_table("A [bold]title[/bold]", ["name", "n"], [["a\nb", 1234], ["[red]", 0.5]])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "A [bold]title[/bold]"
    assert [line.split("│")[1:3] for line in lines if line.startswith("│")] == [
        [" a b   ", " 1,234 "],
        [" [red] ", "   0.5 "],
    ]
