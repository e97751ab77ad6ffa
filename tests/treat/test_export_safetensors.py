from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from export_samples import linears, plan_of, rtn, sample, treat
from layerwright.core.checkpoint import Checkpoint
from layerwright.core.errors import CheckpointError, InputError
from layerwright.core.layers import list_layers
from layerwright.core.storage import stored_bytes
from layerwright.core.treatment import LowRank, Quantize
from layerwright.data.loading import load
from layerwright.treat.export import FORMATS, dense_copy, export_model
from zoo import ZOO, logits

FORMS = {
    "quantized": "llama",
    "sparse": "llama",
    "low_rank": "llama",
    "mixed": "gpt2",
    "dropped": "llama",
    "experts": "mixtral",
    "tied": "qwen3",
}

RELOAD = """
import sys
from safetensors.torch import load_file, save_file
from layerwright.data.loading import load
out = {}
for folder in sys.argv[2:]:
    model, _ = load(folder)
    out[folder] = model(**load_file(folder + "/batch.st")).logits.detach().contiguous()
save_file(out, sys.argv[1])
"""


def test_a_new_process_computes_the_same_bits(tmp_path: Path) -> None:
    wanted = {}
    for form, name in FORMS.items():
        _, small, _, batch = sample(name, form, torch.bfloat16 if form == "quantized" else torch.float32)
        out = export_model(small, tmp_path / form)
        save_file(batch, out / "batch.st")
        wanted[str(out)] = logits(small, batch)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", RELOAD, str(tmp_path / "logits"), *wanted],
        capture_output=True,
        text=True,
        env=environment,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    got = load_file(tmp_path / "logits")
    for folder, expected in wanted.items():
        assert torch.equal(got[folder], expected), folder


@pytest.mark.parametrize("form", FORMS)
def test_tensors_and_bytes_are_as_predicted(form: str, tmp_path: Path) -> None:
    model, small, plan, _ = sample(FORMS[form], form)
    checkpoint = Checkpoint.open(export_model(small, tmp_path / "out"))
    refs = {ref.path: ref for ref in list_layers(model)}
    gone = [path for path, treatments in plan.items() if refs[path].kind == "block"]
    before = {
        ref.parameter: ref
        for ref in refs.values()
        if ref.parameter and not ref.tied and not ref.path.startswith(tuple(f"{path}." for path in gone))
    }
    state = dict(model.named_parameters())
    dropped = tuple(f"{path}." for path in gone)
    plain = {
        name: tensor.nbytes
        for name, tensor in state.items()
        if not (name in before and plan.get(before[name].path)) and not (dropped and name.startswith(dropped))
    }
    predicted, count = sum(plain.values()), len(plain)
    for ref in before.values():
        treatments = plan.get(ref.path, ())
        if treatments:
            predicted += stored_bytes(treatments, *ref.shape, ref.count, 4)
            count += _tensors(treatments)
    assert checkpoint.total_bytes == predicted
    assert len(checkpoint.files) == count


def _tensors(treatments: tuple[object, ...]) -> int:
    quantize = next((t for t in treatments if isinstance(t, Quantize)), None)
    factors = 2 if any(isinstance(t, LowRank) for t in treatments) else 1
    mask = any(type(t).__name__ == "Sparsify" for t in treatments)
    each = 1 if quantize is None else 2 if quantize.symmetric else 3
    return factors * each + mask


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_model_that_only_lost_blocks_is_a_plain_checkpoint(name: str, tmp_path: Path) -> None:
    model, small, _, batch = sample(name, "only_dropped")
    out = export_model(small, tmp_path / "out")
    assert not (out / "layerwright.json").exists()
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 3
    again = type(model).from_pretrained(out).eval()
    assert torch.equal(logits(again, batch), logits(small, batch))
    assert torch.equal(logits(load(out)[0], batch), logits(small, batch))


@pytest.mark.parametrize("name", ["mixtral", "qwen3", "resnet"])
def test_an_untreated_model_is_written_as_transformers_does(name: str, tmp_path: Path) -> None:
    model, batches = ZOO[name]()
    out = export_model(model, tmp_path / "out")
    model.save_pretrained(tmp_path / "theirs")
    assert Checkpoint.open(out).files.keys() == Checkpoint.open(tmp_path / "theirs").files.keys()
    assert torch.equal(logits(load(out)[0], batches[0]), logits(model, batches[0]))


def test_a_head_parted_from_its_table_stays_parted(tmp_path: Path) -> None:
    from layerwright.core.treatment import Quantize

    model, batches = ZOO["qwen3"]()
    head = next(ref.path for ref in list_layers(model) if ref.tied)
    small = treat(model, {head: (Quantize(3, -1, method="rtn"),)})
    plain = dense_copy(small)
    assert torch.equal(logits(plain, batches[0]), logits(small, batches[0]))
    again = type(model).from_pretrained(export_model(plain, tmp_path / "plain"))
    assert torch.equal(logits(again, batches[0]), logits(small, batches[0]))
    assert model.config.tie_word_embeddings
    assert torch.equal(logits(load(export_model(small, tmp_path / "own"))[0], batches[0]), logits(small, batches[0]))


def test_a_dense_head_of_its_own_stays_apart_among_treated_layers(tmp_path: Path) -> None:
    import transformers

    model, batches = ZOO["qwen3"]()
    head = next(ref.path for ref in list_layers(model) if ref.tied)
    small = dense_copy(treat(model, {head: (rtn(2),)}))  # a head with a plain weight of its own
    small = treat(small, {path: (rtn(4, 16),) for path in linears(small)})
    expected = logits(small, batches[0])
    assert torch.equal(logits(load(export_model(small, tmp_path / "own"))[0], batches[0]), expected)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        export_model(small, tmp_path / "ct", "compressed-tensors")
    )
    assert torch.equal(logits(theirs.eval(), batches[0]), logits(dense_copy(small), batches[0]))


@pytest.mark.parametrize(
    ("name", "form"), [("gpt2", "mixed"), ("mixtral", "experts"), ("qwen3", "tied"), ("llama", "low_rank")]
)
def test_a_dense_copy_computes_the_same_with_plain_layers(name: str, form: str, tmp_path: Path) -> None:
    model, small, _, batch = sample(name, form)
    before = logits(small, batch)
    plain = dense_copy(small)
    assert [type(m) for m in plain.modules()] == [type(m) for m in model.modules()]
    torch.testing.assert_close(logits(plain, batch), before, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(small, batch), before)
    again = type(model).from_pretrained(export_model(small, tmp_path / "out", dequantize=True)).eval()
    assert torch.equal(logits(again, batch), logits(plain, batch))


def test_a_dense_copy_of_a_model_without_configuration() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Conv2d(4, 8, 3, padding=1, groups=2), torch.nn.Flatten(), torch.nn.Linear(8 * 16, 6)
        )
    x = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    for treatments in [(rtn(4),), (LowRank(3, "svd"),)]:
        small = treat(model, {"0": treatments, "2": treatments})
        plain = dense_copy(small)
        assert [type(layer) for layer in plain] == [type(layer) for layer in model]
        torch.testing.assert_close(plain(x), small(x), rtol=1e-5, atol=1e-5)


def test_the_settings_of_generation_and_the_tokenizer_travel_along(tmp_path: Path) -> None:
    model, processor = load("demo:lm")
    small = treat(model, {linears(model)[0]: (rtn(4, 32),)})
    out = export_model(small, tmp_path / "out", processor=processor)
    assert {"generation_config.json", "tokenizer.json", "layerwright.json", "config.json"} <= {
        path.name for path in out.iterdir()
    }
    _, again = load(out)
    assert again("Layer by layer")["input_ids"] == processor("Layer by layer")["input_ids"]


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    _, small, _, _ = sample("llama", "quantized")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(CheckpointError, match="No space left"):
        export_model(small, tmp_path / "deep" / "out")
    assert list(tmp_path.rglob("*")) == []


def test_an_output_is_replaced_only_by_force(tmp_path: Path) -> None:
    model, small, _, batch = sample("llama", "quantized")
    out = export_model(small, tmp_path / "out")
    with pytest.raises(CheckpointError, match="--force"):
        export_model(small, out)
    export_model(model, out, force=True)
    assert not (out / "layerwright.json").exists()
    assert torch.equal(logits(load(out)[0], batch), logits(model, batch))


def test_unknown_formats_and_models_without_configuration(tmp_path: Path) -> None:
    assert FORMATS.names() == ["compressed-tensors", "gguf", "onnx", "safetensors"]
    with pytest.raises(InputError, match="compressed-tensors"):
        export_model(torch.nn.Linear(2, 2), tmp_path / "out", "compressed_tensor")
    with pytest.raises(CheckpointError, match="no configuration"):
        export_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_plans_of_samples_touch_what_they_say() -> None:
    model, _ = ZOO["mixtral"]()
    assert all("experts" in path for path in plan_of(model, "experts"))
