from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer

from layerwright.cli.bench_mq import bench_mq
from layerwright.core.errors import CheckError, InputError
from layerwright.recipes.bench_mq import stored_bench
from layerwright.score.proxies import BitBench, as_proxy

APP = typer.Typer()
APP.command()(bench_mq)


def command(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    APP([str(a) for a in arguments], standalone_mode=False)
    return capsys.readouterr().out


def test_a_table_is_built_ranked_and_searched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "table.json"
    said = json.loads(command(capsys, "demo:cnn", "--build", "12", "--seed", "3", "-o", table, "--json"))
    assert said["vectors"] == 12 and said["best"] < said["worst"] and said["out"] == str(table)
    bench = BitBench.load(table)
    assert bench.layers == stored_bench("demo:cnn").layers and "--build 12" in bench.generator
    text = command(capsys, "demo:cnn", "--bench", table, "-p", "emq", "-p", "size")
    assert "emq" in text and "size" in text and "best 20%" in text


def test_a_search_writes_a_proxy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, state = tmp_path / "proxy.json", tmp_path / "state.json"
    options = ("--search", "12", "--population", "8", "--inputs", "G,W", "--state", state)
    said = json.loads(command(capsys, "demo:cnn", *options, "-o", found, "--json"))
    name = said["found"]["expression"]
    assert as_proxy(found).name == name and state.is_file()
    assert set(said["correlations"]) >= {name, "emq", "snip", "size"}
    assert set(said["correlations"]["emq"]) == {"0.2", "0.5", "1.0"}
    text = command(capsys, "demo:cnn", *options)
    assert name in text and "evaluated" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo:lm"], "unknown stored table of bit vectors"),
        (["demo:cnn", "--proxy", "sniff"], "unknown bit proxy 'sniff'.*snip"),
        (["demo:cnn", "--search", "5", "--structure", "forest"], "structure"),
        (["demo:cnn", "--search", "5", "--inputs", "Q"], "unknown statistic 'Q'"),
        (["demo:cnn", "--build", "12", "--widths", "2;3", "-o", "x.json"], "widths"),
        (["demo:cnn", "--build", "12"], "--build needs --out"),
        (["demo:cnn", "--bench", "setup.json"], "setup.json"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, capsys: Any) -> None:
    with pytest.raises((InputError, FileNotFoundError), match=message):
        command(capsys, *arguments)


def test_a_place_that_cannot_be_written_is_refused_first(tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(CheckError, match="is a folder"):
        command(capsys, "demo:cnn", "--build", "12", "-o", tmp_path)
