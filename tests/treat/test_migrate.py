"""Factors and shifts moved from norms into their readers: exact, for every architecture that allows it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from layerwright.core.calibration import as_calibration
from layerwright.core.errors import InputError
from layerwright.core.layers import structure_copy
from layerwright.core.plan import Plan
from layerwright.core.treatment import Quantize
from layerwright.treat.apply import apply_plan
from layerwright.treat.migrate import find_norm_readers, migrate_, norm_offset
from layerwright.treat.prepare import prepare_
from layerwright.treat.smooth import _forms, channel_ranges, smooth_
from zoo import ZOO, logits

PRE_NORM = [
    "llama",
    "gpt2",
    "vit",
    "deit",
    "swin",
    "opt",
    "bloom",
    "gpt_neox",
    "gemma2",
    "qwen3",
    "phi3",
    "t5",
    "whisper",
]


@pytest.mark.parametrize("name", PRE_NORM)
def test_readers_are_found_and_the_function_stays(name: str) -> None:
    model, batches = ZOO[name]()
    model.double().eval()
    calibration = as_calibration(
        [{k: v.double() if v.is_floating_point() else v for k, v in b.items()} for b in batches]
    )
    groups = [g for g in find_norm_readers(model, calibration) if not g.others]
    assert len(groups) >= 4
    moved = structure_copy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        before = [logits(model, batch) for batch in calibration]
    for group in groups:
        scale = torch.rand(group.channels, generator=generator) * 3 + 0.2
        shift = torch.randn(group.channels, generator=generator) if group.shift else None
        migrate_(moved, group, scale, shift)
    with torch.no_grad():
        after = [logits(moved, batch) for batch in calibration]
        again = [logits(model, batch) for batch in calibration]
    for a, b, c in zip(after, before, again, strict=True):
        # Gemma's norms compute in float32 whatever they are given.
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 if name == "gemma2" else 1e-9)
        assert torch.equal(b, c)  # the model that shares the tensors is untouched


def test_query_key_value_share_one_norm() -> None:
    model, batches = ZOO["llama"]()
    first = find_norm_readers(model, as_calibration(batches))[0]
    assert first.norm == "model.layers.0.input_layernorm"
    assert {path.rpartition(".")[2] for path in first.readers} == {"q_proj", "k_proj", "v_proj"}
    assert not first.shift  # a root-mean-square norm has no bias


@pytest.mark.parametrize("name", ["bert", "bart", "roberta"])
def test_norms_before_a_residual_sum_are_left_alone(name: str) -> None:
    model, batches = ZOO[name]()
    groups = find_norm_readers(model, as_calibration(batches))
    shared = [group for group in groups if group.others]
    assert shared
    with pytest.raises(InputError, match="also read by add"):
        migrate_(structure_copy(model), shared[0], torch.ones(shared[0].channels))


class Net(nn.Module):
    """A norm without weight or bias, and a reader without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6, elementwise_affine=False)
        self.read = nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.read(self.norm(x))
        return y


def test_weights_and_biases_are_made_where_there_are_none() -> None:
    torch.manual_seed(0)
    model, x = Net().double(), torch.randn(5, 6).double()
    (group,) = find_norm_readers(model, as_calibration([{"x": x}]))
    copy = structure_copy(model)
    scale, shift = torch.rand(6) + 0.5, torch.randn(6)
    migrate_(copy, group, scale, shift)
    torch.testing.assert_close(copy(x), model(x))
    torch.testing.assert_close(copy.norm(x), (model.norm(x) - shift) / scale)
    with pytest.raises(InputError, match="expected 6 positive numbers"):
        migrate_(copy, group, scale - 2)
    with pytest.raises(InputError, match="expected 6 positive numbers"):
        migrate_(copy, group, scale[:3])


@pytest.mark.parametrize("name", ["vit", "swin", "llama"])
def test_factors_of_one_and_no_shift_change_no_bit(name: str) -> None:
    model, batches = ZOO[name]()
    copy = structure_copy(model)
    for group in find_norm_readers(model, as_calibration(batches)):
        if not group.others:
            migrate_(copy, group, torch.ones(group.channels), torch.zeros(group.channels) if group.shift else None)
    for key, value in copy.state_dict().items():
        # A reader without bias has one of zeros now.
        assert torch.equal(value, model.state_dict().get(key, torch.zeros_like(value))), key
    assert torch.equal(logits(copy, batches[0]), logits(model, batches[0]))


def test_factors_keep_within_bounds() -> None:
    model = Net()
    with torch.no_grad():
        model.read.weight.copy_(torch.tensor([1e-12, 1.0, 1.0, 1.0, 1.0, 1e12]).expand(3, 6))
    (group,) = find_norm_readers(model, as_calibration([torch.randn(5, 6)]))
    ends = torch.tensor([[1e6, 1.0, 1e-7, 2.0, 3.0, 1e-3]])
    (scale, shift) = _forms(model, group, (-ends[0], ends[0]), "balance", 0.5, False)["smoothed"]
    assert shift is None and scale[0] == 1e4 and scale[5] == pytest.approx(1e-4) and scale[2] == 1
    assert scale[3] == pytest.approx(2**0.5)


def test_norms_that_add_one_to_their_weight() -> None:
    gemma, _ = ZOO["gemma2"]()
    llama, _ = ZOO["llama"]()
    assert norm_offset(gemma.model.layers[0].input_layernorm) == 1.0
    assert norm_offset(llama.model.layers[0].input_layernorm) == 0.0
    assert norm_offset(nn.LayerNorm(4)) == 0.0


def test_log_rule_gives_the_published_ranges() -> None:
    model, batches = ZOO["vit"]()
    calibration = as_calibration(batches)
    groups = find_norm_readers(model, calibration)
    before = channel_ranges(model, calibration, groups)
    copy = structure_copy(model)
    smooth_(copy, calibration, rule="log")
    after = channel_ranges(copy, calibration, groups)
    for path, (low, high) in before.items():
        size, new = torch.maximum(low.abs(), high.abs()), torch.maximum(after[path][0].abs(), after[path][1].abs())
        torch.testing.assert_close(new, torch.log2(2 + size), rtol=1e-4, atol=1e-4)


def test_shift_centres_every_channel() -> None:
    model, batches = ZOO["vit"]()
    calibration = as_calibration(batches)
    groups = find_norm_readers(model, calibration)
    copy = structure_copy(model)
    smooth_(copy, calibration, rule="none", shift=True)
    for low, high in channel_ranges(copy, calibration, groups).values():
        torch.testing.assert_close(low, -high, rtol=1e-3, atol=1e-4)


def test_a_plan_carries_its_preparation(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model, batches = ZOO["vit"]()
    path = find_norm_readers(model, as_calibration(batches))[0].readers[0]
    layers = {path: (Quantize(4, method="rtn"),)}
    plan = Plan(layers=layers, prepare={"smooth": {"rule": "balance", "alpha": 0.7}})
    read = Plan.load(plan.save(tmp_path / "plan.yaml"))
    assert read.prepare == plan.prepare
    prepared, _ = apply_plan(model, read, batches)
    plain, _ = apply_plan(model, layers, batches)
    assert not torch.equal(logits(prepared, batches[0]), logits(plain, batches[0]))
    by_hand = structure_copy(model)
    prepare_(by_hand, plan.prepare, as_calibration(batches))
    same, _ = apply_plan(by_hand, layers, batches)
    assert torch.equal(logits(prepared, batches[0]), logits(same, batches[0]))


def test_bad_input() -> None:
    model, batches = ZOO["vit"]()
    calibration = as_calibration(batches)
    with pytest.raises(InputError, match="smoth"):
        prepare_(model, {"smoth": {}}, calibration)
    with pytest.raises(InputError, match="unexpected keyword argument 'beta'"):
        prepare_(model, {"smooth": {"beta": 1}}, calibration)
    with pytest.raises(InputError, match="pass calibration data"):
        prepare_(model, {"smooth": {}}, None)
    with pytest.raises(InputError, match="calibration"):
        smooth_(model, as_calibration([]))
    with pytest.raises(InputError, match="alpha 2"):
        smooth_(model, calibration, alpha=2)
    resnet, images = ZOO["resnet"]()
    with pytest.raises(InputError, match="cannot be smoothed"):
        smooth_(resnet, as_calibration(images))
    llama, texts = ZOO["llama"]()
    with pytest.raises(InputError, match="shift: auto"):
        smooth_(structure_copy(llama), as_calibration(texts), shift=True)
