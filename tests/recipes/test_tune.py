from __future__ import annotations

from pathlib import Path

import pytest
import torch

from layerwright.core.errors import CheckError
from layerwright.core.layers import list_layers
from layerwright.core.treatment import Quantize
from layerwright.data.loading import load
from layerwright.recipes.tune import measure_job, tune_job
from layerwright.treat.apply import apply_plan
from layerwright.treat.writer import copy_side_files, save_model

SMALL = {"samples": 8, "length": 32, "steps": 3, "seconds": 0.05}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from layerwright.data.loading import locate

    model, processor = load("demo:lm", dtype="float32")
    out = tmp_path_factory.mktemp("packed") / "lm"
    plan = {r.path: (Quantize(3, method="rtn"),) for r in list_layers(model) if r.role in ("q", "down")}
    save_model(apply_plan(model, plan)[0], out)
    copy_side_files(locate("demo:lm").folder, out, processor)
    return out


def test_a_merged_model_is_saved_and_measured(tmp_path: Path) -> None:
    measured = tune_job("demo:lm", "lora", tmp_path / "out", dtype="float32", **SMALL)
    assert list(measured) == ["before", "after"]
    assert measured["after"].bytes == measured["before"].bytes
    model, _ = load(tmp_path / "out")
    assert not any("lora" in name for name in model.state_dict())
    with pytest.raises(CheckError, match="already holds"):
        tune_job("demo:lm", "lora", tmp_path / "out", **SMALL)


def test_an_adapter_is_saved_alone(tmp_path: Path) -> None:
    tune_job("demo:lm", "lora", tmp_path / "out", keep_adapter=True, **SMALL)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    assert "config.json" not in names


def test_packed_weights_are_saved_with_their_adapters(tmp_path: Path, packed: Path) -> None:
    measured = tune_job(packed, "distill", tmp_path / "out", teacher="demo:lm", dtype="float32", **SMALL)
    assert list(measured) == ["teacher", "before", "after"]
    model, _ = load(tmp_path / "out")
    assert sum(name.endswith("lora_A") for name in model.state_dict()) == 8 * 7
    again = measure_job([packed, tmp_path / "out"], samples=8, length=32, seconds=0.05, dtype="float32")
    assert len(again) == 2
    with torch.no_grad():
        assert torch.isfinite(model(torch.zeros(1, 4, dtype=torch.long)).logits).all()


def test_problems_are_told_together_before_anything_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("")
    with pytest.raises(CheckError) as caught:
        tune_job(tmp_path / "nothing", "distil", tmp_path / "out")
    assert len(caught.value.problems) == 3
    assert "did you mean distill" in str(caught.value)
    with pytest.raises(CheckError, match="--teacher"):
        tune_job("demo:lm", "distill", tmp_path / "new")
    with pytest.raises(CheckError, match="--keep-adapter"):
        tune_job("demo:lm", "full", tmp_path / "new", keep_adapter=True)
    assert not (tmp_path / "new").exists()
