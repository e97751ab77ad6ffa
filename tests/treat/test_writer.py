from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from export_samples import sample
from layerwright.core.checkpoint import Checkpoint
from layerwright.core.errors import CheckpointError
from layerwright.data.loading import load
from layerwright.treat import writer
from layerwright.treat.writer import (
    PROGRESS,
    CheckpointWriter,
    check_folder,
    copy_side_files,
    prepare_folder,
    save_model,
    unique_tensors,
    write_json,
)
from zoo import ZOO, logits


def test_shards_of_bounded_size_and_an_index_that_adds_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "SHARD_BYTES", 20_000)
    _, small, _, batch = sample("llama", "mixed")
    out = save_model(small, tmp_path / "out")
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) > 2
    largest = max(tensor.nbytes for tensor in unique_tensors(small).values())
    assert all(path.stat().st_size < max(20_000, largest) + 10_000 for path in shards)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == Checkpoint.open(out).total_bytes
    assert index["weight_map"] == dict(Checkpoint.open(out).files)
    assert not list(out.glob("*.tmp"))
    assert torch.equal(logits(load(out)[0], batch), logits(small, batch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_configuration_states_the_dtype_of_a_model_that_was_built(dtype: torch.dtype, tmp_path: Path) -> None:
    _, small, _, _ = sample("llama", "quantized", dtype)
    small.config.dtype = None  # type: ignore[union-attr]
    out = save_model(small, tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    again, _ = load(out)
    assert {p.dtype for p in again.parameters()} == {dtype}


def test_tied_tensors_are_stored_once() -> None:
    model, _ = ZOO["qwen3"]()
    names = unique_tensors(model, "top.")
    assert "top.model.embed_tokens.weight" in names
    assert "top.lm_head.weight" not in names


def test_folders_that_hold_something_else_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="is a file"):
        check_folder(tmp_path / "file")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("x")
    with pytest.raises(CheckpointError, match=r"something else \(cat.jpg\)"):
        prepare_folder(tmp_path / "photos", force=True)
    assert (tmp_path / "photos" / "cat.jpg").exists()


def test_force_clears_only_what_is_ours(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in ("layerwright.json", "model-00000.safetensors", "config.json", "tokenizer.json", "notes.md"):
        (out / name).write_text("{}")
    with pytest.raises(CheckpointError, match="--force"):
        prepare_folder(out)
    prepare_folder(out, force=True)
    assert [path.name for path in out.iterdir()] == ["notes.md"]


def test_an_unfinished_output_is_gone_on_with(tmp_path: Path) -> None:
    (tmp_path / PROGRESS).mkdir()
    (tmp_path / "block-0.safetensors").write_text("kept")
    prepare_folder(tmp_path)
    assert (tmp_path / "block-0.safetensors").exists()


def test_a_full_disk_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    def full(_: object, path: Path, **__: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(CheckpointError, match="No space left"):
        CheckpointWriter(tmp_path).add("model", {"w": torch.zeros(2)})
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_json(tmp_path / "missing" / "config.json", {})


def test_side_files_are_copied_and_never_overwritten(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "model.safetensors", "pytorch_model.bin"):
        (source / name).write_text("theirs")
    (out / "tokenizer.json").write_text("ours")
    copy_side_files(source, out)
    assert {path.name for path in out.iterdir()} == {"tokenizer.json", "chat_template.jinja"}
    assert (out / "tokenizer.json").read_text() == "ours"


def test_a_model_without_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no configuration"):
        save_model(torch.nn.Linear(2, 2), tmp_path / "out")
