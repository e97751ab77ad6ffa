"""The commands on good input, in one process."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from layerwright.cli import main
from layerwright.core.plan import Plan
from layerwright.data.loading import load

SMALL = ["--samples", "4", "--length", "32"]
COMMANDS = (
    *("check", "inspect", "plan", "apply", "tune", "measure", "export", "optimize"),
    *("report", "recipes", "systems", "study", "place", "bench-mq", "grow", "init", "depth", "serve", "shape"),
)
GROUPS = {"scaling": ("fit", "design")}


Said = Callable[..., str]


def parsed(text: str) -> Any:
    """`text` as JSON, and nothing around it."""
    return json.loads(text)


@pytest.mark.parametrize("command", [*COMMANDS, *(f"{group} {name}" for group in GROUPS for name in GROUPS[group])])
def test_help_shows_an_example_that_parses(command: str, said: Said) -> None:
    text = said(*command.split(), "--help")
    assert f"Example: layerwright {command}" in " ".join(text.replace("`", "").split())


def test_the_commands_are_the_ones_that_are_tested(said: Said) -> None:
    import typer

    from layerwright.cli.app import app

    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert set(known) == {*COMMANDS, *GROUPS}
    assert all(set(known[group].commands) == set(names) for group, names in GROUPS.items())
    assert all(command in said("--help") for command in COMMANDS)


def test_check_says_what_it_would_take_and_writes_nothing(tiny: Path, tmp_path: Path, said: Said) -> None:
    data = parsed(said("check", tiny, "-b", "bits=4", "-o", tmp_path / "out", "--json", *SMALL))
    assert data["ok"] is True
    assert data["forecast"]["output_bytes"] < (tiny / "model.safetensors").stat().st_size
    assert not (tmp_path / "out").exists()
    assert "nothing stands in the way of bits=4" in said("check", tiny, "-b", "bits=4", *SMALL)


def test_inspect_lists_every_layer_and_saves_scores(tmp_path: Path, said: Said) -> None:
    arguments = ["--scores", "similarity", "--samples", "2", "--length", "64", "-o", tmp_path / "scores"]
    data = parsed(said("inspect", "demo:lm", *arguments, "--json"))
    blocks = [row for row in data["layers"] if row["kind"] == "block"]
    assert len(blocks) == 8 and all(0 <= row["similarity"] <= 1 for row in blocks)
    # The table counts every stored weight once, and a block's own row sums up what is in it.
    leaves = [row for row in data["layers"] if row["kind"] in ("linear", "norm", "embedding")]
    assert sum(row["params"] for row in leaves) == data["total"]["params"]
    assert data["total"]["params"] == sum(p.numel() for p in load("demo:lm")[0].parameters())
    assert data["total"]["bytes"] == 2 * data["total"]["params"]
    assert {path.name for path in (tmp_path / "scores").iterdir()} == {"similarity.json", "profile.json"}


def test_plan_apply_measure(tiny: Path, tmp_path: Path, said: Said) -> None:
    plan, out = tmp_path / "plan.yaml", tmp_path / "out"
    decided = parsed(said("plan", tiny, "-b", "bits=4", "-r", "mixed", "-o", plan, "--json", *SMALL))
    assert Plan.load(plan).layers.keys() == decided["layers"].keys()
    assert decided["optimal"] is True
    assert decided["predicted"]["bytes"] <= decided["limits"]["bytes"]
    applied = parsed(said("apply", tiny, plan, "-o", out, "--json", *SMALL))
    assert applied["streamed"] is True
    assert {row["status"] for row in applied["layers"]} == {"done"}
    assert applied["forecast"]["output_bytes"] == pytest.approx(decided["predicted"]["bytes"], rel=1e-6)
    measured = parsed(said("measure", tiny, out, "--seconds", "0.05", "--json", *SMALL))
    first, second = measured.values()
    assert second["bytes"] == pytest.approx(decided["predicted"]["bytes"], rel=1e-6)
    assert second["bytes"] < 0.6 * first["bytes"]
    # Streamed and whole are the same model.
    said("apply", tiny, plan, "-o", tmp_path / "whole", "--whole", *SMALL)
    one, other = load(out)[0].state_dict(), load(tmp_path / "whole")[0].state_dict()
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_apply_prints_forecast_beside_measured(tiny: Path, tmp_path: Path, said: Said) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text("layerwright_plan: 1\nlayers:\n  model.layers.1.mlp.up_proj: {quantize: {bits: 4}}\n")
    text = said("apply", tiny, plan, "-o", tmp_path / "out", *SMALL)
    assert "block by block; forecast: peak memory" in text
    assert "peak memory forecast" in text and "disk forecast" in text and "measured" in text


def test_the_forecast_of_the_output_comes_from_the_shapes(tiny: Path, tmp_path: Path, said: Said) -> None:
    plan = tmp_path / "plan.yaml"
    sizes = {}
    for bits in (2, 4, 8):
        layers = "".join(f"  model.layers.{n}.mlp.up_proj: {{quantize: {{bits: {bits}}}}}\n" for n in range(3))
        plan.write_text(f"layerwright_plan: 1\nlayers:\n{layers}")
        data = parsed(said("apply", tiny, plan, "-o", tmp_path / f"out{bits}", "--json", *SMALL))
        sizes[bits] = data["forecast"]["output_bytes"]
        assert data["forecast"]["disk_bytes"] >= data["forecast"]["output_bytes"]
    weights = 3 * 64 * 32
    assert sizes[8] - sizes[4] == weights * 4 / 8
    assert sizes[4] - sizes[2] == weights * 2 / 8


def test_scores_are_measured_once(tiny: Path, tmp_path: Path, said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    from layerwright.score.base import SCORERS

    scores, runs = tmp_path / "scores", []
    get = SCORERS.get

    def counted(name: str) -> Any:
        def scorer(*args: Any, **kwargs: Any) -> Any:
            runs.append(name)
            time.sleep(2)
            return get(name)(*args, **kwargs)

        return scorer

    monkeypatch.setattr(SCORERS, "get", counted)
    common = ["-r", "mixed", "--scores", scores, "--json", *SMALL]
    plans = [parsed(said("plan", tiny, "-b", f"bits={b}", "-o", tmp_path / f"{b}.yaml", *common)) for b in (4, 3)]
    assert runs == ["fisher"]
    assert plans[1]["predicted"]["bytes"] < plans[0]["predicted"]["bytes"]
    assert plans[1]["predicted"]["damage"] > plans[0]["predicted"]["damage"]
    # Other data: measured again.
    said("plan", tiny, "-b", "bits=4", "-o", tmp_path / "again.yaml", *common[:-1], "16")
    assert runs == ["fisher", "fisher"]


def test_optimize_prints_one_object_and_leaves_a_whole_folder(tiny: Path, tmp_path: Path, said: Said) -> None:
    recipe, out = tmp_path / "own.yaml", tmp_path / "out"
    recipe.write_text(
        "{name: own, scorer: weight_error, allocator: integer, "
        "candidates: [{quantize: {bits: 4, method: mse}}, {quantize: {bits: 8, method: mse}}]}"
    )
    arguments = [tiny, "-b", "size=0.5x", "-r", recipe, "-o", out, "--json", *SMALL]
    data = parsed(said("optimize", *arguments))
    for name in ("before", "after", "uniform"):
        assert {"loss", "bytes", "ms", "tokens_per_second"} <= data[name].keys()
        assert all(data[name][key] > 0 for key in ("loss", "bytes", "ms", "tokens_per_second"))
    assert data["after"]["bytes"] <= 0.5 * data["before"]["bytes"]
    assert data["uniform"]["bytes"] <= 0.5 * data["before"]["bytes"]
    assert data["checkpoint"] == str(out) and data["seconds"] > 0 and data["peak_memory_bytes"] > 1e8
    assert all(Path(data[key]).is_file() for key in ("plan", "report"))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    model, tokenizer = load(out)
    ids = tokenizer("def f(x):", return_tensors="pt")["input_ids"]
    assert torch.isfinite(model(input_ids=ids).logits).all()
    # Again over it: only with --force, and to the same bytes.
    weights = (out / "model-00000.safetensors").read_bytes()
    assert main(["optimize", *map(str, arguments)]) == 2
    said("optimize", *arguments, "--force", "--no-uniform")
    assert (out / "model-00000.safetensors").read_bytes() == weights
    # The report can be written again from what lies there.
    (out / "report.html").unlink()
    assert parsed(said("report", out, "--json"))["report"] == str(out / "report.html")
    assert "<html" in (out / "report.html").read_text()


def test_tune_writes_a_model_that_loads(tiny: Path, tmp_path: Path, said: Said) -> None:
    out = tmp_path / "tuned"
    data = parsed(said("tune", tiny, "-m", "lora", "--steps", "2", "--rank", "2", "-o", out, "--json", *SMALL))
    assert data["checkpoint"] == str(out) and {"before", "after"} <= data.keys()
    assert torch.isfinite(load(out)[0].lm_head.weight).all()


def test_export_writes_plain_safetensors(tiny: Path, tmp_path: Path, said: Said) -> None:
    out = tmp_path / "exported"
    data = parsed(said("export", tiny, "--format", "safetensors", "-o", out, "--json"))
    assert data == {"format": "safetensors", "path": str(out)}
    one, other = load(tiny)[0].state_dict(), load(out)[0].state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_lists(said: Said) -> None:
    names = [item["name"] for item in parsed(said("recipes", "--json"))]
    assert {"mixed", "joint", "rtn", "adaquant"} <= set(names)
    table = said("recipes")
    assert all(name[:6] in table for name in names)
    slugs = [item["slug"] for item in parsed(said("systems", "--json"))]
    assert "adaquant" in slugs
    assert "adaqua" in said("systems")
