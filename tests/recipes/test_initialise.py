from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from layerwright.core.errors import CheckpointError, InputError
from layerwright.data.loading import load, locate
from layerwright.recipes.bench import read_data
from layerwright.recipes.initialise import REPORT, initialise
from layerwright.score.variance_profile import variance_profile

SMALL = {"samples": 4, "length": 32, "exclude": ("lm_head",)}


def test_a_fresh_model_is_started_written_and_loaded(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "config"
    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    assert not list(folder.glob("*.safetensors"))
    done = initialise(folder, out=tmp_path / "out", fresh=True, tol=1e-3, **SMALL)  # type: ignore[arg-type]
    assert done.report.converged and done.folder == tmp_path / "out"
    written = json.loads((tmp_path / "out" / REPORT).read_text())
    assert written["method"] == "lsuv" and len(written["layers"]) == len(done.report.rows)
    model, _ = load(tmp_path / "out", dtype="float32")
    data, _ = read_data(locate(folder), None, samples=4, length=32)
    profile = variance_profile(model, data)
    for row in done.report.rows:
        assert profile[row.name][1] == pytest.approx(1, abs=0.02)
    again = initialise(folder, fresh=True, tol=1e-3, **SMALL)  # type: ignore[arg-type]
    assert again.report == done.report and again.folder is None
    other = initialise(folder, fresh=True, tol=1e-3, seed=1, **SMALL)  # type: ignore[arg-type]
    assert other.report != done.report


def test_weights_that_are_there_are_scaled_only() -> None:
    trained, _ = load("demo:cnn")
    done = initialise("demo:cnn", samples=64, orthonormal=False)
    old, new = trained.state_dict(), done.model.state_dict()
    for row in done.report.rows:
        torch.testing.assert_close(
            new[f"{row.name}.weight"], old[f"{row.name}.weight"] * row.scale, rtol=1e-4, atol=1e-6
        )
    assert any(row.tries for row in done.report.rows)


def test_bad_input_is_named(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing_like_this"):
        initialise(tiny, samples=2, length=16, exclude=("nothing_like_this",))
    with pytest.raises(FileNotFoundError, match="no model at"):
        initialise(tmp_path / "none")
    with pytest.raises(InputError, match="tol"):
        initialise(tiny, samples=2, length=16, tol=-1.0)
    treated = tmp_path / "treated"
    initialise(tiny, out=treated, samples=2, length=16)
    (treated / "layerwright.json").write_text(json.dumps({"layerwright_checkpoint": 1, "structure": {}}))
    with pytest.raises(CheckpointError, match="fresh"):
        initialise(treated, samples=2, length=16, fresh=True)
