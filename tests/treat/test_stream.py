"""Treating a checkpoint block by block from its files, and taking up a run that was killed."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
from pathlib import Path

import pytest
import torch

from layerwright.core.calibration import Calibration
from layerwright.core.errors import CheckpointError
from layerwright.core.layers import treatable
from layerwright.core.plan import Plan
from layerwright.core.records import ApplyReport
from layerwright.core.treatment import Drop, LowRank, Quantize, Sparsify
from layerwright.data.loading import load
from layerwright.treat.apply import apply_plan
from layerwright.treat.stream import apply_checkpoint, streams
from layerwright.treat.writer import PROGRESS
from zoo import ZOO

NAMES = ["llama", "qwen2", "gpt2", "t5", "bert", "vit", "resnet", "swin", "mixtral", "whisper"]


def _saved(name: str, folder: Path) -> tuple[torch.nn.Module, Calibration, Plan]:
    torch.manual_seed(0)
    model, batches = ZOO[name]()
    model.save_pretrained(folder)
    treatments = ((Quantize(4),), (Sparsify(0.5), Quantize(3)), (LowRank(4),), (Quantize(8, method="rtn"),))
    layers = {}
    for number, ref in enumerate(treatable(model)):
        chosen = treatments[number % len(treatments)]
        if ref.layout in ("experts", "experts_transposed", "conv"):
            chosen = (Quantize(4),)
        layers[ref.path] = chosen
    return model, Calibration(batches), Plan(layers=layers)


def _hash(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob("*"))
        if path.suffix in (".safetensors", ".json")
    }


@pytest.mark.parametrize("name", NAMES)
def test_streaming_equals_memory(name: str, tmp_path: Path) -> None:
    model, data, plan = _saved(name, tmp_path / "in")
    why = streams(tmp_path / "in")
    if why:  # names that are converted on loading: said, not guessed
        assert "converted" in why
        with pytest.raises(CheckpointError, match="converted"):
            apply_checkpoint(tmp_path / "in", plan, data, tmp_path / "out")
        return
    report = apply_checkpoint(tmp_path / "in", plan, data, tmp_path / "out")
    whole, expected = apply_plan(model, plan, data)
    streamed, _ = load(tmp_path / "out")
    assert {r.layer: r.error for r in report} == pytest.approx({r.layer: r.error for r in expected}, rel=1e-4, abs=1e-7)
    ours, theirs = whole.state_dict(), streamed.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert data.mean_loss(streamed) == pytest.approx(data.mean_loss(whole), rel=1e-5)
    assert not (tmp_path / "out" / PROGRESS).exists()


@pytest.mark.parametrize(("name", "after"), [("llama", 1), ("llama", 2), ("t5", 3), ("whisper", 3)])
def test_a_killed_run_goes_on_to_the_same_bytes(name: str, after: int, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    folder, out = tmp_path / "in", tmp_path / "out"
    _, data, plan = _saved(name, folder)
    apply_checkpoint(folder, plan, data, tmp_path / "whole")
    process = multiprocessing.get_context("spawn").Process(target=_die_on, args=(folder, out, name, after))
    process.start()
    process.join(120)
    assert process.exitcode == 9
    assert (out / PROGRESS / "run.json").exists()
    assert not (out / "model.safetensors.index.json").exists()
    done = len(ApplyReport.load(out / PROGRESS / "apply.jsonl"))
    assert done > 0
    report = apply_checkpoint(folder, plan, data, out)
    assert report.resumed_at
    assert len(report) == len(plan.layers)
    assert _hash(out) == _hash(tmp_path / "whole")


def _die_on(folder: Path, out: Path, name: str, after: int) -> None:
    torch.set_num_threads(1)
    _, data, plan = _saved(name, out.parent / "scratch")
    seen = []

    def die(path: str, _done: int, _total: int) -> None:
        seen.append(path)
        if len(seen) > after:
            os._exit(9)

    apply_checkpoint(folder, plan, data, out, progress=die)


def test_another_plan_does_not_take_up_the_run(tmp_path: Path) -> None:
    model, data, plan = _saved("llama", tmp_path / "in")

    class StopError(Exception):
        pass

    def stop(_path: str, done: int, _total: int) -> None:
        if done > 1:
            raise StopError

    with pytest.raises(StopError):
        apply_checkpoint(tmp_path / "in", plan, data, tmp_path / "out", progress=stop)
    other = Plan(layers={next(iter(plan.layers)): (Quantize(8, method="rtn"),)})
    with pytest.raises(CheckpointError, match="another run"):
        apply_checkpoint(tmp_path / "in", other, data, tmp_path / "out")
    assert all(module.__dict__.get("forward") is None for module in model.modules())


def test_dropping_blocks_while_streaming(tmp_path: Path) -> None:
    model, data, plan = _saved("llama", tmp_path / "in")
    last = "model.layers.1"
    layers = {path: t for path, t in plan.layers.items() if not path.startswith(last + ".")} | {last: (Drop(),)}
    apply_checkpoint(tmp_path / "in", Plan(layers=layers), data, tmp_path / "out")
    whole, _ = apply_plan(model, Plan(layers=layers), data)
    streamed, _ = load(tmp_path / "out")
    assert data.mean_loss(streamed) == pytest.approx(data.mean_loss(whole), rel=1e-5)
    assert streamed.config.num_hidden_layers == model.config.num_hidden_layers - 1


def test_a_model_without_blocks_does_not_stream(tmp_path: Path) -> None:
    import transformers

    config = transformers.BertConfig(
        vocab_size=48, hidden_size=16, intermediate_size=32, num_hidden_layers=0, num_attention_heads=2
    )
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "in")
    assert streams(tmp_path / "in") == "it has no repeated blocks"
