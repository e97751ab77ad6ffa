"""Plans of mixed treatments: what each format takes, what it refuses, and our own layout, which takes everything."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from export_samples import cast_, linears, rtn
from layerwright.core.errors import CheckpointError
from layerwright.core.layers import list_layers
from layerwright.core.target import target
from layerwright.core.treatment import FactorConv, MixRows, RoundActivations, RoundAttention, Treatments
from layerwright.data.loading import load
from layerwright.nn.factorized import FactorizedConv
from layerwright.nn.rounded_cache import round_cache_
from layerwright.nn.w4a8 import W4A8Linear, integer_layers_
from layerwright.treat.apply import apply_plan
from layerwright.treat.export import dense_copy, export_model
from layerwright.treat.export._onnx import traceable
from zoo import ZOO, logits

TOKEN = RoundActivations(8, share="token", symmetric=True)
STATIC = RoundActivations(8, symmetric=True, observer="minmax")

FORMS: dict[str, tuple[str, str]] = {
    "mixed rows": ("llama", "MixRows: rows of 8 and 4 bits"),
    "two regions": ("llama", "RoundActivations: 5 bits two_region per tensor"),
    "per channel": ("llama", "RoundActivations: 8 bits uniform per channel"),
    "attention": ("vit", "RoundAttention: key 6 bits uniform"),
    "cache": ("llama", "keys and values of 8 bits"),
    "chains": ("resnet", "FactorConv: a chain of 2 convolutions"),
    "w4a8": ("llama", ""),
    "odd widths": ("llama", ""),
}
"""Form to the model it is tried on, and how a refusal names it; empty where compressed-tensors takes it."""


def plan_of(form: str, model: nn.Module) -> dict[str, Treatments]:
    inside = linears(model)
    if form == "mixed rows":
        return {path: (MixRows(4, "8: 0-3 9", 16, "rtn"),) for path in inside[:4]}
    if form == "two regions":
        return {path: (rtn(4, 16), RoundActivations(5, grid="two_region")) for path in inside[:4]}
    if form == "per channel":
        return {path: (rtn(4, 16), RoundActivations(8, share="channel")) for path in inside[:4]}
    if form == "attention":
        paths = [ref.path for ref in list_layers(model) if ref.kind == "attention"]
        return {path: (RoundAttention(6, "log_sqrt2"),) for path in paths}
    if form == "chains":
        convs = [ref for ref in list_layers(model) if ref.kind == "conv"]
        chosen = [ref for ref in convs if getattr(model.get_submodule(ref.path), "kernel_size", ()) == (3, 3)][-3:]
        kinds = [FactorConv(2), FactorConv(2, "svd", 2), FactorConv(3, "svd", 5)]
        return {ref.path: (kind,) for ref, kind in zip(chosen, kinds, strict=True)}
    if form == "w4a8":
        return {path: (rtn(4, 16), TOKEN if i % 2 else STATIC) for i, path in enumerate(inside)}
    if form == "odd widths":
        return {path: (rtn((3, 5, 6, 7)[i % 4], (16, -1)[i % 2]),) for i, path in enumerate(inside)}
    return {}


@cache
def treated(form: str) -> tuple[nn.Module, dict[str, Treatments], dict[str, Tensor]]:
    """The treated model, its plan and a batch."""
    model, batches = ZOO[FORMS[form][0]]()
    plan = plan_of(form, model)
    small = apply_plan(model, plan, batches)[0].eval()
    if form == "cache":
        paths = [ref.path for ref in list_layers(small) if ref.kind == "block"]
        plan = dict.fromkeys(round_cache_(small, dict.fromkeys(paths, 8)), ())
    return small, plan, {k: v for k, v in batches[0].items() if k != "labels"}


@pytest.mark.parametrize("form", FORMS)
def test_our_own_layout_takes_everything(form: str, tmp_path: Path) -> None:
    small, _, batch = treated(form)
    again, _ = load(export_model(small, tmp_path / "out"))
    assert torch.equal(logits(again, batch), logits(small, batch))


@pytest.mark.parametrize("form", [form for form, (_, words) in FORMS.items() if words])
def test_one_line_names_what_others_cannot_express(form: str, tmp_path: Path) -> None:
    small, plan, _ = treated(form)
    takes = {"mixed rows": (), "two regions": ("onnx",), "per channel": ("onnx",), "chains": ("onnx",)}.get(form, ())
    for name in ("compressed-tensors", "gguf", "onnx"):
        if name in takes:
            continue
        with pytest.raises(CheckpointError) as caught:
            export_model(small, tmp_path / "out", name)
        message = str(caught.value)
        assert message.startswith(name) and "--format safetensors" in message and "\n" not in message
        if name != "gguf" or ("gguf cannot express ResNet" not in message and "gguf cannot express ViT" not in message):
            assert FORMS[form][1] in message
            assert any(path in message for path in plan)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["mixed rows", "chains", "w4a8", "attention", "cache"])
def test_plain_weights_for_formats_that_need_them(form: str, tmp_path: Path) -> None:
    """``--dequantize``: the same model without the rounding of what is read."""
    small, plan, batch = treated(form)
    before = logits(small, batch)
    plain = dense_copy(small)
    assert torch.equal(logits(small, batch), before), "the attachments of the original stay"
    model, batches = ZOO[FORMS[form][0]]()
    if form == "chains":
        torch.testing.assert_close(logits(plain, batch), before, rtol=1e-4, atol=1e-5)
        assert not any(isinstance(module, FactorizedConv) for module in plain.modules())
        return
    weights = {path: tuple(t for t in own if t.tag == "quantize") for path, own in plan.items()}
    if form == "mixed rows":
        weights = {path: (MixRows(4, "8: 0-3 9", 16, "rtn", act_bits=None),) for path in plan}
    wanted = apply_plan(model, {path: own for path, own in weights.items() if own}, batches)[0].eval()
    torch.testing.assert_close(logits(plain, batch), logits(wanted, batch), rtol=1e-5, atol=1e-6)
    assert set(plain.state_dict()) == set(model.state_dict())
    again = type(model).from_pretrained(export_model(small, tmp_path / "out", dequantize=True)).eval()
    assert torch.equal(logits(again, batch), logits(plain, batch))


def auto(out: Path) -> nn.Module:
    import transformers

    model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    return model.eval()


@pytest.mark.parametrize(
    "inputs",
    [
        TOKEN,
        STATIC,
        RoundActivations(8),
        RoundActivations(5, observer="percentile"),
        RoundActivations(4, share="token", symmetric=True),
    ],
)
def test_mixed_bits_and_groups_with_rounded_inputs_load_with_equal_logits(
    inputs: RoundActivations, tmp_path: Path
) -> None:
    """Some layers of 8, 4 and 3 bits, three group sizes, some without rounded inputs, some kept."""
    model, batches = ZOO["llama"]()
    kinds = [rtn(8, 32), rtn(4, 16), rtn(3)]
    plan: dict[str, Treatments] = {}
    for i, path in enumerate(linears(model)):
        if i % 5:
            plan[path] = (kinds[i % 3], inputs) if i % 4 else (kinds[i % 3],)
    small = apply_plan(model, plan, batches)[0].eval()
    batch = {k: v for k, v in batches[0].items() if k != "labels"}
    again = auto(export_model(small, tmp_path / "out", "compressed-tensors"))
    assert torch.equal(logits(again, batch), logits(small, batch))
    unrounded = {path: tuple(t for t in own if t.tag == "quantize") for path, own in plan.items()}
    assert not torch.equal(logits(again, batch), logits(apply_plan(model, unrounded)[0].eval(), batch))
    assert all(target("hf").refuses(own) == "" for own in plan.values())


def test_layers_of_integer_products_load_with_the_same_rounding(tmp_path: Path) -> None:
    model, batches = ZOO["llama"]()
    batch = {k: v for k, v in batches[0].items() if k != "labels"}
    plan: dict[str, Treatments] = {
        path: (rtn(4, 16), (TOKEN, STATIC)[i % 2]) for i, path in enumerate(linears(model)[:3])
    }
    small = apply_plan(model, plan, batches)[0].eval()
    simulated = logits(small, batch)
    assert sorted(integer_layers_(small)) == sorted(plan)
    assert sum(isinstance(module, W4A8Linear) for module in small.modules()) == 3
    again = auto(export_model(small, tmp_path / "out", "compressed-tensors"))
    assert torch.equal(logits(again, batch), simulated)
    torch.testing.assert_close(logits(small, batch), simulated, rtol=1e-3, atol=1e-4)


def test_inputs_that_compressed_tensors_rounds_otherwise_are_refused(tmp_path: Path) -> None:
    model, batches = ZOO["llama"]()
    path = linears(model)[0]
    for own, words in (
        ((rtn(4), RoundActivations(8, share="token")), "zero points of tokens"),
        ((RoundActivations(8),), "only beside an integer weight"),
        ((rtn(8, act_bits=8), RoundActivations(8)), "only beside an integer weight"),
        ((rtn(4, symmetric=False), TOKEN), "asymmetric"),
    ):
        small = apply_plan(model, {path: own}, batches)[0]
        with pytest.raises(CheckpointError, match=words) as caught:
            export_model(small, tmp_path / "out", "compressed-tensors")
        assert path in str(caught.value)
    cast_(model, torch.bfloat16)
    small = apply_plan(model, {path: (rtn(4, 16), TOKEN)}, batches)[0].eval()
    batch = {k: v for k, v in batches[0].items() if k != "labels"}
    ours, theirs = (
        logits(small, batch),
        logits(auto(export_model(small, tmp_path / "out", "compressed-tensors")), batch),
    )
    assert (ours - theirs).norm() < 0.05 * ours.norm()  # they divide in bfloat16, we in float32


@pytest.mark.parametrize("form", ["w4a8", "two regions", "per channel"])
def test_what_onnx_is_traced_from_still_rounds(form: str) -> None:
    """A layer's rounded input goes with it when the layer becomes a plain product."""
    small, plan, batch = treated(form)
    for model in (small, _integers(small)):
        copied, codes = traceable(model)
        torch.testing.assert_close(logits(copied, batch), logits(small, batch), rtol=2e-3, atol=2e-4)
        assert set(codes) == {f"{path}.weight" for path in plan}
        plain = logits(dense_copy(small), batch)
        assert (logits(copied, batch) - plain).norm() > 10 * (logits(copied, batch) - logits(small, batch)).norm()


def _integers(model: nn.Module) -> nn.Module:
    other = copy.deepcopy(model)
    integer_layers_(other)
    return other
