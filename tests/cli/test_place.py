"""`layerwright place`, run as a command of its own."""

from __future__ import annotations

import json

import pytest
import typer

from layerwright.cli.place import place
from layerwright.core.errors import InputError

SMALL = ["--batch", "8", "--context", "64", "--new-tokens", "32", "--steps", "20"]


@pytest.fixture
def run(capsys):
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(place)

    def call(*arguments) -> str:
        app([str(argument) for argument in arguments], prog_name="layerwright place", standalone_mode=False)
        return capsys.readouterr().out

    return call


def test_tables(run) -> None:
    text = run("mixtral", *SMALL, "--compare", "gpu,pim")
    assert "attention.decode" in text and "mixtral on 4 x duplex" in text
    assert "pim" in text and "tokens/s" in text


def test_json_and_files(run, tmp_path) -> None:
    out = tmp_path / "out"
    data = json.loads(run("glam", *SMALL, "--device", "bank_pim", "-o", out, "--json", "--efficiency", "0.7,0.8"))
    assert data["device"]["low"]["efficiency"] == 0.8 and data["gains"]["gpu"] > 1
    assert sorted(path.name for path in out.iterdir()) == ["place.yaml", "report.html", "results.json"]
    assert json.loads((out / "results.json").read_text())["seed"] == 0


def test_a_device_of_ones_own_and_a_trace(run, tmp_path) -> None:
    device = tmp_path / "mine.yaml"
    device.write_text("high: {flops: 2e15, bandwidth: 8e12}\nlow: {bandwidth: 32e12, op_per_byte: 4}\n")
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival,prompt,new\n0,10,3\n0.1,20,4\n")
    data = json.loads(run("mixtral", "--device", device, "--requests", trace, "--batch", "4", "--json"))
    assert data["device"]["name"] == "mine" and data["systems"]["mine"]["completed"] == 2


def test_help_has_an_example(run) -> None:
    import typer.testing

    app = typer.Typer()
    app.command()(place)
    text = typer.testing.CliRunner().invoke(app, ["--help"], terminal_width=200).output
    assert "Example: `layerwright place mixtral" in " ".join(text.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mixtrl"], "did you mean mixtral"),
        (["mixtral", "--device", "none.yaml"], "no device file at none.yaml"),
        (["mixtral", "--efficiency", "1.2"], "efficiency: got '1.2'"),
        (["mixtral", "--efficiency", "a"], "efficiency: got 'a'"),
        (["mixtral", "--rate", "0"], "rate: got 0.0"),
        (["mixtral", "--requests", "no.csv"], "no trace at no.csv"),
        (["mixtral", "--skew", "-1"], "skew: got -1"),
        (["mixtral", "--devices", "1"], "do not fit"),
        (["mixtral", "--compare", "gpu,nothing"], "unknown system to compare with 'nothing'"),
    ],
)
def test_errors_are_one_line(run, arguments, message) -> None:
    with pytest.raises((InputError, FileNotFoundError), match=message) as caught:
        run(*arguments, *SMALL)
    assert "\n" not in str(caught.value)
