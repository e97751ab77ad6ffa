from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from export_samples import cast_, int4, linears, rtn, sample, treat
from layerwright.core.checkpoint import Checkpoint
from layerwright.core.errors import CheckpointError
from layerwright.core.treatment import Sparsify
from layerwright.treat.export import _compressed_tensors, dense_copy, export_model
from zoo import ZOO, logits

FORMAT = "compressed-tensors"


def auto(out: Path, **settings: Any) -> nn.Module:
    import transformers

    model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(out, **settings)
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_integer_weights_load_with_equal_logits(dtype: torch.dtype, tmp_path: Path) -> None:
    """Bits, group sizes and rows that end inside a word, one setting per layer."""
    model, batches = ZOO["llama"]()
    cast_(model, dtype)
    kinds = [int4, rtn(3), rtn(8, 32), rtn(5, 8), rtn(2, 16), rtn(6), rtn(7, 32)]
    small = treat(model, {path: (kinds[i % len(kinds)],) for i, path in enumerate(linears(model))})
    again = auto(export_model(small, tmp_path / "out", FORMAT), dtype="auto")
    assert again.dtype == dtype
    assert torch.equal(logits(again, batches[0]), logits(dense_copy(small), batches[0]))


def test_mixed_formats_match_within_the_rounding_of_activations(tmp_path: Path) -> None:
    _, small, plan, batch = sample("llama", "symmetric")
    out = export_model(small, tmp_path / "out", FORMAT)
    written = json.loads((out / "config.json").read_text())["quantization_config"]
    assert written["format"] == "mixed-precision"
    named = [path for group in written["config_groups"].values() for path in group["targets"]]
    assert sorted(named) == sorted(plan)
    assert written["ignore"] == ["lm_head"]
    ours, theirs = logits(small, batch), logits(auto(out), batch)
    plain = logits(dense_copy(small), batch)
    assert (ours - theirs).norm() < 0.01 * ours.norm()
    assert not torch.equal(theirs, plain)  # their activations are rounded too


def test_names_and_bytes_on_disk(tmp_path: Path) -> None:
    model, _ = ZOO["llama"]()
    first, second, *_ = linears(model)
    small = treat(model, {first: (int4,), second: (rtn(8, act_bits=8),)})
    checkpoint = Checkpoint.open(export_model(small, tmp_path / "out", FORMAT))
    of_first = {name.removeprefix(f"{first}.") for name in checkpoint.files if name.startswith(f"{first}.")}
    assert of_first == {"weight_packed", "weight_scale", "weight_shape"}
    assert checkpoint.shapes[f"{first}.weight_packed"] == (32, 32 // 8)
    assert checkpoint.dtypes[f"{second}.weight"] == "I8"
    assert checkpoint.shapes[f"{second}.weight_scale"] == (model.get_submodule(second).out_features, 1)
    plain = sum(p.nbytes for n, p in model.named_parameters() if n not in (f"{first}.weight", f"{second}.weight"))
    rows = model.get_submodule(second).out_features
    assert checkpoint.total_bytes == plain + (32 * 16 + 32 * 2 * 4 + 16) + (rows * 32 + rows * 4)
    assert json.loads((checkpoint.folder / "config.json").read_text())["quantization_config"]["quant_method"] == FORMAT


def test_a_mixture_of_experts_loads_with_quantized_attention(tmp_path: Path) -> None:
    model, batches = ZOO["mixtral"]()
    small = treat(model, dict.fromkeys(linears(model), (int4,)))
    out = export_model(small, tmp_path / "out", FORMAT)
    assert torch.equal(logits(auto(out), batches[0]), logits(dense_copy(small), batches[0]))


def test_static_activation_scales_load(tmp_path: Path) -> None:
    from layerwright.core.layer import LayerRef
    from layerwright.nn import replace_
    from layerwright.treat.quantize import round_to_nearest

    model, batches = ZOO["llama"]()
    path = linears(model)[0]
    layer = model.get_submodule(path)
    assert isinstance(layer, nn.Linear)
    treatment = rtn(8, act_bits=8, act_mode="static")
    stored = round_to_nearest(layer.weight.detach().unsqueeze(0), treatment, torch.float32)
    import dataclasses

    stored = dataclasses.replace(stored, quantize=treatment, input_scale=torch.tensor(0.03))
    ref = LayerRef(path, "linear", f"{path}.weight", tuple(layer.weight.shape), layout="linear")
    replace_(model, ref, stored)
    again = auto(export_model(model, tmp_path / "out", FORMAT))
    ours, theirs = logits(model, batches[0]), logits(again, batches[0])
    assert (ours - theirs).norm() < 0.002 * ours.norm()


@pytest.mark.parametrize(
    ("name", "form", "reason"),
    [
        ("llama", "quantized", "asymmetric"),
        ("llama", "sparse", "SparseLinear"),
        ("llama", "low_rank", "LowRankLinear"),
        ("mixtral", "experts", "PackedStack"),
        ("qwen3", "tied", "QuantEmbedding"),
        ("gpt2", "symmetric", "Conv1D is not nn.Linear"),
    ],
)
def test_what_it_cannot_express_is_refused_before_writing(name: str, form: str, reason: str, tmp_path: Path) -> None:
    _, small, plan, _ = sample(name, form)
    with pytest.raises(CheckpointError, match=reason) as caught:
        export_model(small, tmp_path / "out", FORMAT)
    message = str(caught.value)
    assert any(path in message for path in plan)
    assert "--dequantize" in message
    assert "--format safetensors" in message
    assert "\n" not in message
    assert list(tmp_path.iterdir()) == []


def test_convolutions_heads_and_untreated_models_are_refused(tmp_path: Path) -> None:
    model, _ = ZOO["resnet"]()
    conv = next(path for path, module in model.named_modules() if isinstance(module, nn.Conv2d))
    with pytest.raises(CheckpointError, match="QuantConv"):
        export_model(treat(model, {conv: (rtn(8),)}), tmp_path / "out", FORMAT)
    model, _ = ZOO["llama"]()
    with pytest.raises(CheckpointError, match="lm_head"):
        export_model(treat(model, {"lm_head": (int4,)}), tmp_path / "out", FORMAT)
    with pytest.raises(CheckpointError, match="no layer is quantized"):
        export_model(model, tmp_path / "out", FORMAT)
    with pytest.raises(CheckpointError, match="transformers model"):
        export_model(nn.Sequential(nn.Linear(2, 2)), tmp_path / "out", FORMAT)
    many = {path: (Sparsify(0.5, "unstructured", "magnitude"),) for path in linears(model)}
    with pytest.raises(CheckpointError, match=f"and {len(many) - 3} more"):
        export_model(treat(model, many), tmp_path / "out", FORMAT)


def test_upstream_still_cannot_load_packed_zero_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When this fails, transformers loads asymmetric checkpoints: allow them, and set `asymmetric` of the target hf."""
    model, batches = ZOO["llama"]()
    small = treat(model, {path: (rtn(4, 16, symmetric=False),) for path in linears(model)})
    monkeypatch.setattr(_compressed_tensors, "problems", lambda *_: [])
    out = export_model(small, tmp_path / "out", FORMAT)
    shapes = Checkpoint.open(out).shapes
    path = linears(model)[0]
    assert shapes[f"{path}.weight_zero_point"] == (32 * 4 // 32, 2)  # as the package itself writes them
    try:
        loaded = torch.equal(logits(auto(out), batches[0]), logits(dense_copy(small), batches[0]))
    except (RuntimeError, ValueError):
        loaded = False
    assert not loaded
