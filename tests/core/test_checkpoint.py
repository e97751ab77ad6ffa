"""Checkpoints are read by their headers, and only inside their folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from layerwright.core.checkpoint import INDEX, SINGLE, Checkpoint, empty_parameters, read_config, read_header
from layerwright.core.errors import CheckpointError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, tmp_path / SINGLE)
    return tmp_path


def test_headers_say_everything_but_the_values(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.shapes == {"a": (2, 3), "b": (4,)}
    assert checkpoint.total_bytes == 24 + 8 and checkpoint.tensor_bytes("b") == 8
    found = dict(checkpoint.read(["b", "a"]))
    assert torch.equal(found["a"], torch.arange(6.0).reshape(2, 3)) and found["b"].dtype == torch.bfloat16
    with pytest.raises(CheckpointError, match="has no tensor c"):
        list(checkpoint.read(["c"]))


@pytest.mark.parametrize("length", [0, 5, 8, 40, -1])
def test_every_truncation_is_seen(folder: Path, length: int) -> None:
    file = folder / SINGLE
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=r"truncated|corrupted"):
        read_header(file)


@pytest.mark.parametrize(
    "entry", [{}, {"dtype": "F32", "shape": [1]}, [], {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}]
)
def test_headers_that_are_json_but_make_no_sense(tmp_path: Path, entry: object) -> None:
    header = json.dumps({"a": entry}).encode()
    (tmp_path / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(CheckpointError, match="corrupted"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/../../x", "..\\x", 3])
def test_an_index_stays_in_its_folder(tmp_path: Path, name: object) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises((CheckpointError, TypeError), match="points outside"):
        Checkpoint.open(tmp_path)


def test_an_index_to_a_missing_file(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"gone.safetensors, which is missing"):
        Checkpoint.open(tmp_path)


def test_configurations(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no model folder"):
        read_config(tmp_path / "gone")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="holds a list, expected an object"):
        read_config(tmp_path)


def test_empty_parameters_are_shapes_and_only_inside_the_context() -> None:
    with empty_parameters():
        norm = nn.BatchNorm1d(3)
    assert norm.weight.is_meta and not norm.running_mean.is_meta  # type: ignore[union-attr]
    assert not nn.Linear(2, 2).weight.is_meta
