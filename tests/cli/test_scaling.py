from __future__ import annotations

import json
import math
from pathlib import Path

import numpy
import pytest

from layerwright.cli.main import main
from layerwright.theory.scaling import LAWS
from layerwright.theory.scaling.laws import published


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    draw = numpy.random.default_rng(0)
    n = numpy.exp(draw.uniform(math.log(1e5), math.log(1e8), 20))
    d = numpy.exp(draw.uniform(math.log(1e6), math.log(1e10), 20))
    law = LAWS["ND"]
    losses = numpy.exp(law.log_loss(law.theta(published("ND")), numpy.log([n, d])) + draw.normal(0, 0.003, 20))
    path = tmp_path / "runs.csv"
    lines = [f"{a},{b},{c}" for a, b, c in zip(n, d, losses, strict=True)]
    path.write_text("n_params,tokens,loss\n" + "\n".join(lines))
    return path


def test_fit_predict_divide_and_draw(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "law.html"
    command = ["scaling", "fit", str(runs), "--at", "n_params=1e8,tokens=1e10", "--flops", "1e18", "--bootstrap", "60"]
    assert main([*command, "-o", str(page)]) == 0
    text = capsys.readouterr().out
    assert "alpha_N" in text and "loss at n_params=1e8,tokens=1e10" in text and "Hoffmann" in text
    drawn = page.read_text()
    assert "Losses and the law" in drawn and "asked for" in drawn and "<script src" not in drawn
    assert main([*command, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["identified"] and data["runs"] == 20
    assert data["params"]["alpha_N"] == pytest.approx(0.076, rel=0.1)
    assert data["prediction"]["low"] < data["prediction"]["loss"] < data["prediction"]["high"]
    assert 6 * data["allocation"]["n_params"] * data["allocation"]["tokens"] == pytest.approx(1e18)
    assert main(["scaling", "fit", str(runs), "--law", "D", "--bootstrap", "20", "-o", str(page)]) == 0
    capsys.readouterr()


def test_design(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scaling", "design", "1e15", "--runs", "8", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 8 and sum(row["flops"] for row in rows) <= 1e15
    assert main(["scaling", "design", "1e15"]) == 0
    assert "n_params" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fit", "none.csv"], "no runs at none.csv"),
        (["fit", "RUNS", "--law", "X"], "unknown law 'X'"),
        (["fit", "RUNS", "--at", "n_params"], "expected name=number"),
        (["fit", "RUNS", "--at", "n_params=many,tokens=1"], "n_params: got 'many'"),
        (["fit", "RUNS", "--at", "n_params=1e12,tokens=1e12"], "beyond the largest run"),
        (["fit", "RUNS", "--irreducible", "some"], "irreducible: got 'some'"),
        (["fit", "RUNS", "--flops", "-1"], "flops: got -1"),
        (["design", "10"], "raise it"),
    ],
)
def test_bad_input_is_one_line(
    runs: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(runs) if argument == "RUNS" else argument for argument in arguments]
    assert main(["scaling", *given, *([] if given[0] == "design" else ["--bootstrap", "20"])]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
