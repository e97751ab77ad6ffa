"""`layerwright grow`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest

from layerwright.cli import main
from layerwright.models import load_network

QUICK = ["--episodes", "1", "--batch", "2", "--wider", "1", "--deeper", "1", "--epochs", "1"]
SHORT = ["--start-epochs", "1", "--final-epochs", "1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "images.npz"
    labels = numpy.arange(60) % 3
    numpy.savez(path, x=numpy.random.default_rng(0).normal(labels[:, None, None, None], 1, (60, 1, 4, 4)), y=labels)
    return path


def test_tables_and_files(said: Callable[..., str], data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    text = said("grow", "conv2,pool,fc3", "-d", data, *QUICK, *SHORT, "-o", out)
    assert "conv-2-3,pool,fc-3" in text and "validation" in text and "networks judged" in text
    assert (out / "results.json").is_file() and load_network(out).classes == 3


def test_json_and_a_second_stage(said: Callable[..., str], data: Path, tmp_path: Path) -> None:
    first = json.loads(said("grow", "g2,t,g2", "-d", data, *QUICK, *SHORT, "-o", tmp_path / "a", "--json"))
    assert [row["network"] for row in first["networks"]] == ["start", "found"] and len(first["episodes"]) == 1
    second = json.loads(
        said("grow", tmp_path / "a", "-d", data, *QUICK, "-o", tmp_path / "b", "--json", "--seed", "3", "--random")
    )
    assert second["networks"][0]["spec"] == first["networks"][1]["spec"] and second["settings"]["seed"] == 3


def test_help_has_an_example(said: Callable[..., str]) -> None:
    text = " ".join(said("grow", "--help").split())
    assert "layerwright grow conv4,conv4,pool,conv8,fc16" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["conv2,nothing"], "spec: got 'nothing'"),
        (["conv2-2"], "spec: got 'conv-2-2'"),
        (["pool,pool,pool"], "more pools"),
        (["conv2", "--data", "none.npz"], "no data at none.npz"),
        (["conv2", "--wider", "0", "--deeper", "0"], "at least one action"),
        (["conv2", "--episodes", "0"], "episodes"),
    ],
)
def test_bad_input_is_exit_code_two(
    arguments: list[str], message: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments if "--data" in arguments else [*arguments, "--data", str(data)]
    assert main(["grow", *given, "-o", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and "Traceback" not in said
    assert not (tmp_path / "out").exists()
