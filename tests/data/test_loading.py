from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from layerwright.core.errors import CheckpointError, InputError
from layerwright.core.layers import list_layers
from layerwright.core.treatment import Quantize
from layerwright.data.loading import DEMOS, load, locate, modality, torch_dtype
from layerwright.treat.apply import apply_plan
from layerwright.treat.writer import save_model
from zoo import ZOO, logits


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A tiny Llama as transformers saves it."""
    model, _ = ZOO["llama"]()
    model.save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


@pytest.fixture
def treated(tmp_path: Path) -> Path:
    model, _ = ZOO["llama"]()
    path = next(ref.path for ref in list_layers(model) if ref.kind == "linear")
    return save_model(apply_plan(model, {path: (Quantize(4, 16, method="rtn"),)})[0], tmp_path / "treated")


@pytest.mark.parametrize("name", DEMOS)
def test_demo_models(name: str) -> None:
    model, processor = load(name)
    source = locate(name)
    assert not model.training
    assert modality(source) == ("text" if name == "demo:lm" else "image")
    assert (processor is not None) == (name == "demo:lm")
    assert source.structure is None


def test_a_plain_folder_by_text_or_path(plain: Path) -> None:
    model, batches = ZOO["llama"]()
    for name in (plain, str(plain), locate(plain)):
        loaded, processor = load(name)  # type: ignore[arg-type]
        assert torch.equal(logits(loaded, batches[0]), logits(model, batches[0]))
        assert processor is None


@pytest.mark.parametrize("wanted", ["bfloat16", torch.bfloat16, None])
def test_dtypes(plain: Path, treated: Path, wanted: Any) -> None:
    for folder in (plain, treated):
        model, _ = load(folder, dtype=wanted)
        expected = torch.float32 if wanted is None else torch.bfloat16
        assert {p.dtype for p in model.parameters()} == {expected}
    assert torch_dtype("auto") is None


def test_names_that_lead_nowhere(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="demo:lm"):
        load("demo:llm")
    with pytest.raises(FileNotFoundError, match="hub name"):
        load(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="local hub cache"):
        locate("nobody/nothing", allow_download=False)
    (tmp_path / "file.txt").write_text("x")
    with pytest.raises(CheckpointError, match="is a file"):
        load(tmp_path / "file.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load(tmp_path / "empty")


def test_settings_that_cannot_be(plain: Path) -> None:
    with pytest.raises(InputError, match="dtype"):
        load(plain, dtype="float8")
    with pytest.raises(InputError, match="device"):
        load(plain, device="abacus")


def test_only_pickled_weights_are_refused(plain: Path) -> None:
    (plain / "model.safetensors").rename(plain / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickled"):
        load(plain)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_weights_are_named(plain: Path, value: float) -> None:
    tensors = load_file(plain / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][3, 4] = value
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.mlp\.up_proj\.weight"):
        load(plain)


def test_truncated_weights(plain: Path) -> None:
    data = (plain / "model.safetensors").read_bytes()
    (plain / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        load(plain)


def test_our_own_layout_is_checked_tensor_by_tensor(treated: Path) -> None:
    file = treated / "model-00000.safetensors"
    good = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    cases = [
        ({k: v for k, v in good.items() if k != name}, "lacks 1 tensors"),
        (good | {"model.layers.0.extra": torch.zeros(2)}, "does not have"),
        (good | {name: good[name][:5]}, "shape"),
    ]
    for tensors, reason in cases:
        save_file({k: v.contiguous() for k, v in tensors.items()}, file)
        (treated / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": dict.fromkeys(tensors, file.name)})
        )
        with pytest.raises(CheckpointError, match=reason):
            load(treated)


def test_descriptions_that_cannot_be_read(treated: Path) -> None:
    path = treated / "layerwright.json"
    good = path.read_text()
    for text, reason in [
        ("{", "not a layerwright checkpoint"),
        ("[]", "not a layerwright checkpoint"),
        (json.dumps(json.loads(good) | {"layerwright_checkpoint": 2}), "newer version"),
    ]:
        path.write_text(text)
        with pytest.raises(CheckpointError, match=reason):
            load(treated)
    data = json.loads(good)
    spec = next(iter(data["structure"].values()))
    path.write_text(json.dumps(data | {"structure": {"model.layers.99.mlp": spec}}))
    with pytest.raises(InputError, match="no layer"):
        load(treated)


def test_importing_the_module_does_not_import_transformers() -> None:
    import subprocess

    code = "import sys, layerwright.data.loading; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(p for p in sys.path if p)})
