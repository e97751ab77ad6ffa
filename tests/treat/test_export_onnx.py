from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from export_samples import linears, rtn, sample, treat
from layerwright.core.errors import CheckpointError
from layerwright.core.layers import list_layers
from layerwright.core.treatment import LowRank, RoundActivations
from layerwright.data.loading import load
from layerwright.nn.w4a8 import integer_layers_
from layerwright.treat.apply import apply_plan
from layerwright.treat.drop import drop_blocks
from layerwright.treat.export import export_model
from layerwright.treat.export._onnx import traceable
from zoo import ZOO, logits

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

WEIGHTS: list[Any] = [
    (rtn(4),),
    (rtn(8, symmetric=False),),
    (LowRank(3, "svd"),),
    (rtn(3, 4, symmetric=False),),
    (rtn(8, 4),),
    (LowRank(4, "svd"), rtn(8)),
]


def run(file: Path, batch: dict[str, Tensor], *, exact: bool = True) -> Tensor:
    """The logits; unless `exact`, ONNX Runtime may round activations for its own 4-bit products, as it does by default."""
    options = onnxruntime.SessionOptions()
    if exact:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options)
    return torch.from_numpy(session.run(None, {name: tensor.numpy() for name, tensor in batch.items()})[0])


def stored(file: Path) -> dict[str, tuple[int, int]]:
    """Element type and bytes of each tensor in the file."""
    return {t.name: (t.data_type, len(t.raw_data)) for t in onnx.load(file).graph.initializer}


def ours(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return logits(copy.deepcopy(model).float(), batch)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def treated(model: nn.Module, kinds: list[Any]) -> tuple[nn.Module, dict[str, Any]]:
    refs = [ref for ref in list_layers(model) if ref.kind in ("linear", "conv", "head") and min(ref.shape) > 8]
    plan = {ref.path: kinds[i % len(kinds)] for i, ref in enumerate(refs) if ref.shape[1] % 8 == 0}
    return treat(model, plan), plan


@pytest.mark.slow
def test_convolutions(tmp_path: Path) -> None:
    model, _ = load("demo:cnn")
    small, plan = treated(model, WEIGHTS)
    out = export_model(small, tmp_path, "onnx")
    assert out == tmp_path / "model.onnx"
    for batch, size in [(1, 32), (3, 48)]:
        images = {"pixel_values": normal(batch, 1, size, size)}
        torch.testing.assert_close(run(out, images), ours(small, images), rtol=1e-4, atol=1e-4)
    tensors = stored(out)
    for path, treatments in plan.items():
        if len(treatments) == 1 and not isinstance(treatments[0], LowRank):
            kind, size = tensors[f"model.{path}.weight.codes"]
            weight = model.get_submodule(path).weight
            assert isinstance(weight, Tensor)
            four = treatments[0].bits <= 4
            assert kind == (onnx.TensorProto.INT4 if four else onnx.TensorProto.INT8)
            assert size == (weight.numel() + 1) // 2 if four else weight.numel()
            assert f"model.{path}.weight" not in tensors
    assert out.stat().st_size < 0.45 * sum(p.nbytes for p in model.parameters())
    assert b"/src/" not in out.read_bytes()  # no paths of the machine that traced it


@pytest.mark.slow
def test_a_vision_transformer(tmp_path: Path) -> None:
    model, _ = load("demo:vit")
    small, _ = treated(model, WEIGHTS)
    config: Any = model.config
    images = {"pixel_values": normal(3, config.num_channels, config.image_size, config.image_size)}
    out = export_model(small, tmp_path / "vit.onnx", "onnx")
    assert out == tmp_path / "vit.onnx"
    expected = ours(small, images)
    torch.testing.assert_close(run(out, images), expected, rtol=1e-4, atol=1e-4)
    assert (run(out, images, exact=False) - expected).norm() < 0.05 * expected.norm()
    tensors = sum(size for _, size in stored(out).values())
    assert tensors < 0.4 * sum(p.nbytes for p in model.parameters())


@pytest.mark.slow
def test_a_language_model_with_integer_activations_and_a_packed_table(tmp_path: Path) -> None:
    model, _ = ZOO["llama"]()
    model, _ = drop_blocks(model, ["model.layers.1", "model.layers.2", "model.layers.3"])
    kinds = [(rtn(8, act_bits=8),), (rtn(4, 16),), (rtn(2, 8),)]
    plan: dict[str, Any] = {path: kinds[i % 3] for i, path in enumerate(linears(model))}
    small = treat(model, plan | {"model.embed_tokens": (rtn(4, 8),)}).to(torch.bfloat16)
    out = export_model(small, tmp_path, "onnx")
    for shape in [(1, 5), (3, 17)]:
        ids = torch.randint(3, 90, shape, generator=torch.Generator().manual_seed(0))
        mask = torch.ones_like(ids)
        mask[-1, :2] = 0
        batch = {"input_ids": ids, "attention_mask": mask}
        got, expected = run(out, batch)[mask.bool()], ours(small, batch)[mask.bool()]
        assert (got - expected).norm() < 0.005 * expected.norm()  # codes of activations may fall to the other side
    tensors = stored(out)
    assert tensors["model.model.embed_tokens.weight.codes"] == (onnx.TensorProto.INT4, 96 * 32 // 2)
    assert next(small.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize(("name", "form"), [("qwen3", "tied"), ("llama", "quantized"), ("gpt2", "low_rank")])
def test_the_model_that_is_traced_computes_the_same(name: str, form: str) -> None:
    _, small, _, batch = sample(name, form)
    plain, codes = traceable(small)
    torch.testing.assert_close(logits(plain, batch), logits(small, batch), rtol=1e-3, atol=2e-3)
    parameters = dict(plain.named_parameters(remove_duplicate=False))
    for path, quantized in codes.items():
        zero = 0 if quantized.zero is None else quantized.zero.unsqueeze(-1).float()
        grouped = quantized.codes.float().view(*quantized.scale.shape, -1)
        weight = ((grouped - zero) * quantized.scale.unsqueeze(-1)).view(quantized.shape)
        assert torch.equal(weight, parameters[path]), path


def test_what_cannot_be_expressed_is_refused_before_writing(tmp_path: Path) -> None:
    for name, form, reason in [("llama", "sparse", "SparseLinear"), ("mixtral", "experts", "PackedStack")]:
        _, small, _, _ = sample(name, form)
        with pytest.raises(CheckpointError, match=reason) as caught:
            export_model(small, tmp_path / "out", "onnx")
        assert "--dequantize" in str(caught.value)
    with pytest.raises(CheckpointError, match="tokens or pixels"):
        export_model(nn.Sequential(nn.Linear(2, 2)), tmp_path / "out", "onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_cannot_be_traced_gives_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = ZOO["llama"]()

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("data-dependent loop\nand a long story")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(CheckpointError, match="LlamaForCausalLM cannot be traced") as caught:
        export_model(model, tmp_path / "out", "onnx")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_rounded_inputs_of_layers(tmp_path: Path) -> None:
    """Beside integer weights and as one layer of integer products."""
    model, batches = ZOO["llama"]()
    batch = {"input_ids": batches[0]["input_ids"], "attention_mask": torch.ones_like(batches[0]["input_ids"])}
    token = RoundActivations(8, share="token", symmetric=True)
    plan = {path: (rtn(4, 32), (token, RoundActivations(8))[i % 2]) for i, path in enumerate(linears(model)[:3])}
    small = apply_plan(model, plan, batches)[0].eval()
    assert len(integer_layers_(small)) == 2
    again = run(export_model(small, tmp_path, "onnx"), batch)
    torch.testing.assert_close(again, logits(small, batch), rtol=1e-4, atol=1e-5)
