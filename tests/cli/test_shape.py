from __future__ import annotations

import json
from pathlib import Path

import pytest

from layerwright.cli.main import main

SMALL = ["--params", "24k", "--steps", "2", "--batch", "2", "--seeds", "2", "--depths", "1,2", "--tolerance", "0.2"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "own.txt"
    path.write_text("".join(f"line {n} of a text of my own\n" for n in range(400)))
    return path


def test_it_compares_writes_and_goes_on(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = ["shape", "--task", "lm", "--data", str(text), *SMALL, "-o", str(out)]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "forecast: 4 runs, about" in said and "best: " in said and "bits/byte" in said
    assert {path.name for path in out.iterdir()} == {"runs.json", "shape.json", "shape.html"}
    first = json.loads((out / "shape.json").read_text())
    page = (out / "shape.html").read_text()
    assert "bits/byte by depth" in page and "<script src" not in page
    # The same again trains nothing; a further seed trains that alone.
    assert main([*command, "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["runs"] == first["runs"] and again["forecast_seconds"] == 0
    more = [part if part != "2" or command[n - 1] != "--seeds" else "3" for n, part in enumerate(command)]
    assert main(more) == 0
    assert "forecast: 2 runs (4 kept from before)" in capsys.readouterr().out
    grown = json.loads((out / "shape.json").read_text())
    assert len(grown["runs"]) == 6 and [run for run in grown["runs"] if run["seed"] < 2] == first["runs"]
    for row in first["shapes"]:
        assert row["block_parameters"] == pytest.approx(24_000, rel=0.2)
        assert row["latency_ms"] > 0 and row["tokens_per_second"] > 0 and row["activation_bytes"] > 0
        assert 0 < row["hc_ratio"] < 1 and -1 <= row["token_cosine"] <= 1
    # Another comparison does not mix with it.
    assert main([*command, "--rate", "1e-3"]) == 2
    error = capsys.readouterr().err
    assert "holds a comparison with another rate" in error and error.count("\n") == 1
    assert main([*command, "--rate", "1e-3", "--force"]) == 0
    capsys.readouterr()
    assert len(json.loads((out / "runs.json").read_text())["runs"]) == 4


def test_one_seed_says_that_noise_is_not_known(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [part if part != "2" or SMALL[n - 1] != "--seeds" else "1" for n, part in enumerate(SMALL)]
    assert main(["shape", "--task", "text", "--objective", "masked", "--data", str(text), *arguments]) == 0
    said = capsys.readouterr().out
    assert "bits/masked byte" in said and "one seed tells nothing of noise" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--params", "many", "--task", "lm"], "params: got 'many'"),
        (["--params", "0", "--task", "lm"], "params: got '0'"),
        (["--params", "-5k", "--task", "lm"], "params: got '-5k'"),
        (["--params", "24k", "--task", "mlmm"], "unknown task 'mlmm'; did you mean"),
        (["--params", "24k", "--task", "lm", "--objective", "masked"], "give --task text --objective masked"),
        (["--params", "24k", "--task", "images", "--objective", "next"], "images has no objective next"),
        (["--params", "24k", "--task", "text", "--objective", "fast"], "unknown objective 'fast'"),
        (["--params", "24k", "--task", "lm", "--data", "SHORT"], "has 5 bytes, expected at least"),
        (["--params", "24k", "--task", "lm", "--data", "none.txt"], "no text file at none.txt"),
        (["--params", "24k", "--task", "classify", "--data", "TEXT"], "takes the library's sources alone"),
        (["--params", "24k", "--task", "lm", "--data", "TEXT", "--depths", "2,x"], "depths: got '2,x'"),
        (
            ["--params", "24k", "--task", "lm", "--data", "TEXT", "--depths", "64", "--tolerance", "0.01"],
            "feasible: none",
        ),
        (["--params", "3", "--task", "lm", "--data", "TEXT"], "feasible: none"),
        (["--params", "24k", "--task", "lm", "--data", "TEXT", "--steps", "0"], "steps: got 0"),
        (["--params", "24k", "--task", "lm", "--data", "TEXT", "--aspect", "colour"], "aspect: got colour"),
        (["--params", "24k", "--task", "lm", "--data", "TEXT", "--match", "bytes"], "match: got 'bytes'"),
        (["--params", "24k", "--task", "lm", "--data", "TEXT", "--rate", "0"], "rate: got 0"),
        (
            ["--params", "24k", "--task", "lm", "--data", "TEXT", "--depths", "2", "-o", "FULL"],
            "is no comparison of shapes",
        ),
        (["--params", "24k", "--task", "lm", "--data", "TEXT", "--depths", "2", "-o", "BROKEN"], "is damaged"),
        (["--params", "24k", "--task", "lm", "-o", "TEXT"], "is a file: give a folder"),
    ],
)
def test_bad_input_is_one_line(
    text: Path, tmp_path: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "short.txt").write_text("short")
    for name, entry in (("full", "mine.txt"), ("broken", "runs.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / entry).write_text("{}")
    places = {"SHORT": "short.txt", "TEXT": text.name, "FULL": "full", "BROKEN": "broken"}
    given = [str(tmp_path / places[part]) if part in places else part for part in arguments]
    assert main(["shape", *given]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert (tmp_path / "full" / "mine.txt").is_file()
