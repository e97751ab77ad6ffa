"""Relevance: every rule against loops, conserved by each and by whole networks."""

from __future__ import annotations

import copy
import time
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from layerwright.core.errors import InputError
from layerwright.core.layers import list_layers, treatable
from layerwright.core.option import Scores
from layerwright.core.treatment import Quantize, RoundActivations, Sparsify, Treatments
from layerwright.explain import lrp as explain_lrp
from layerwright.score.base import SCORERS, Subject
from layerwright.score.relevance import (
    contributions,
    lrp,
    lrp_add,
    lrp_contribution,
    lrp_conv,
    lrp_linear,
    lrp_matmul,
    lrp_multiply,
    lrp_pixels,
    lrp_proportional,
    safe_divide,
)
from oracles.relevance import add_loop, linear_loop, matmul_loop
from zoo import ZOO

SEEDS = st.integers(0, 10_000)


def draw(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


@given(SEEDS, st.sampled_from([1.0, 2.0, 3.5]))
@settings(max_examples=20, deadline=None)
def test_linear_is_the_loop_and_conserves(seed: int, alpha: float) -> None:
    x, weight, relevance = draw(seed, (3, 7), (4, 7), (3, 4))
    # No denominator is so small that what keeps it from zero shows.
    x[:, 0], weight[:, 0] = x[:, 0].abs() + 0.5, weight[:, 0].abs() + 0.5
    x[:, 1], weight[:, 1] = x[:, 1].abs() + 0.5, -weight[:, 1].abs() - 0.5
    found = lrp_linear(x, weight, relevance, alpha=alpha)
    torch.testing.assert_close(found, linear_loop(x, weight, relevance, alpha), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.sum(), relevance.sum(), rtol=1e-6, atol=1e-6)


def test_linear_for_a_negative_input_counts_products_not_signs() -> None:
    x, weight = torch.tensor([[-1.0, 2.0, -3.0]]), torch.tensor([[-4.0, 1.0, 5.0]])
    found = lrp_linear(x, weight, torch.ones(1, 1))
    torch.testing.assert_close(found, torch.tensor([[4.0, 2.0, 0.0]]) / 6)


@given(SEEDS)
@settings(max_examples=15, deadline=None)
def test_matmul_is_the_loop_and_conserves(seed: int) -> None:
    a, b, relevance = draw(seed, (3, 4), (4, 2), (3, 2))
    left, right = lrp_matmul(a, b, relevance)
    expected = matmul_loop(a, b, relevance)
    torch.testing.assert_close(left, expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(right, expected[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(left.sum(), relevance.sum() / 2, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(right.sum(), relevance.sum() / 2, rtol=1e-5, atol=1e-5)


@given(SEEDS)
@settings(max_examples=20, deadline=None)
def test_add_is_the_loop_with_its_totals(seed: int) -> None:
    a, b, relevance = draw(seed, (3, 5), (3, 5), (3, 5))
    relevance = relevance.abs()
    first, second = lrp_add(a, b, relevance)
    expected = add_loop(a, b, relevance)
    torch.testing.assert_close(first, expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(second, expected[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close((first + second).sum(1), relevance.sum(1), rtol=1e-6, atol=1e-6)
    assert (first.sum(1) >= -1e-9).all() and (second.sum(1) >= -1e-9).all()  # totals are parts of a positive total
    alone = [lrp_add(a[n : n + 1], b[n : n + 1], relevance[n : n + 1])[0] for n in range(3)]
    torch.testing.assert_close(first, torch.cat(alone))  # samples do not see each other


def test_add_takes_what_is_broadcast() -> None:
    a, b, relevance = draw(0, (2, 4, 3), (2, 1, 3), (2, 4, 3))
    first, second = lrp_add(a, b, relevance.abs())
    assert first.shape == a.shape and second.shape == b.shape
    torch.testing.assert_close(first.sum() + second.sum(), relevance.abs().sum())


@pytest.mark.parametrize(
    "settings", [{}, {"stride": 2, "padding": 1}, {"groups": 2}, {"padding": "same", "dilation": 2}]
)
def test_convolution_is_the_linear_rule_on_patches(settings: dict[str, Any]) -> None:
    groups = settings.get("groups", 1)
    x, weight = draw(1, (2, 4, 6, 6), (6, 4 // groups, 3, 3))
    output = F.conv2d(x, weight, **settings)
    relevance = torch.rand(output.shape, generator=torch.Generator().manual_seed(0)).double()
    found = lrp_conv(x, weight, relevance, **settings)
    torch.testing.assert_close(found.sum(), relevance.sum(), rtol=1e-6, atol=1e-6)
    if not settings:
        patches = F.unfold(x, 3).transpose(1, 2)  # (batch, places, in * 9)
        rows = lrp_linear(patches, weight.flatten(1), relevance.flatten(2).transpose(1, 2))
        torch.testing.assert_close(found, F.fold(rows.transpose(1, 2), (6, 6), 3), rtol=1e-6, atol=1e-9)


def test_pixels_give_relevance_to_dark_ones_too() -> None:
    weight, relevance = draw(2, (4, 1, 2, 2), (2, 4, 3, 3))
    x = torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    found = lrp_pixels(x, weight, relevance.abs(), -1, 1, stride=2)
    torch.testing.assert_close(found.sum(), relevance.abs().sum())
    assert (found >= -1e-12).all()  # every term of the denominator is positive
    dark = lrp_pixels(torch.full_like(x, -0.999), weight, relevance.abs(), -1, 1, stride=2)
    assert (dark > 0).any()
    with pytest.raises(InputError, match="low below high"):
        lrp_pixels(x, weight, relevance, 1, 1, stride=2)


def test_small_rules() -> None:
    a, relevance = draw(3, (2, 5), (2, 5))
    left, right = lrp_multiply(a, a[:1], relevance)
    torch.testing.assert_close(left.sum() + right.sum(), relevance.sum())
    positive = a.abs()
    pooled = lrp_proportional(lambda x: x.mean(1), positive, torch.ones(2).double())
    torch.testing.assert_close(pooled, positive / positive.sum(1, keepdim=True))
    numbers = safe_divide(torch.tensor([1.0, 1.0, 2.0]), torch.tensor([0.0, -2.0, 4.0]))
    torch.testing.assert_close(numbers, torch.tensor([0.0, -0.5, 0.5]))
    with pytest.raises(InputError, match="alpha"):
        lrp_linear(a, a, relevance, alpha=0.5)


def test_a_positive_linear_chain_has_a_closed_form() -> None:
    first, second, x = (t.abs() for t in draw(4, (5, 6), (3, 5), (4, 6)))
    chain = nn.Sequential(nn.Linear(6, 5, bias=False), nn.ReLU(), nn.Linear(5, 3, bias=False)).double()
    with torch.no_grad():
        chain[0].weight.copy_(first)
        chain[2].weight.copy_(second)
    found = lrp(chain, x, target=1, attention=False)
    whole = (second @ first)[1]  # (in,): all of it is one positive map
    torch.testing.assert_close(found.input, x * whole / (x @ whole)[:, None], rtol=1e-6, atol=1e-9)
    assert found.leak < 1e-6
    assert set(found.by_layer) == {"0", "2"}


@pytest.mark.parametrize("name", ["vit", "deit", "swin"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_whole_network_conserves(name: str, attention: str) -> None:
    model, batches = ZOO[name]()
    model.set_attn_implementation(attention)
    x = batches[0]["pixel_values"]
    single = lrp(model, x)
    assert single.leak < 1e-3 and single.input.dtype == torch.float32
    state = copy.deepcopy(model.state_dict())
    model.double()
    found = lrp(model, x.double(), gradients=True)
    assert found.leak < 1e-6
    assert found.input.shape == x.shape and torch.equal(found.target, model(x.double()).logits.argmax(-1))
    if name == "swin":
        assert found.constants.abs().max() < 1e-9  # no learned token
    assert all(torch.equal(a.float(), b) for a, b in zip(model.state_dict().values(), state.values(), strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(p.grad is not None for p in model.parameters())


def test_a_trained_network_conserves_with_the_rule_for_pixels() -> None:
    from layerwright.data.demo_data import digits
    from layerwright.data.loading import load

    model, _ = load("demo:vit", dtype="float32")
    x = digits("calibration")[0][:16]
    found = lrp(model, x, pixels=(-1.01, 1.01))
    assert found.leak < 1e-3
    # Four pixels may all speak against a feature: without the rule for pixels, what they should get is lost there.
    plain = lrp(model, x)
    assert plain.leak > 0.01
    assert all(torch.equal(plain.by_layer[name], values) for name, values in found.by_layer.items())
    model.double()
    assert lrp(model, x.double(), pixels=(-1.01, 1.01)).leak < 1e-6


def test_both_forms_of_attention_agree_and_batches_are_samples() -> None:
    model, batches = ZOO["vit"]()
    model.double()
    x = batches[0]["pixel_values"].double()
    model.set_attn_implementation("eager")
    eager = lrp(model, x, gradients=True)
    model.set_attn_implementation("sdpa")
    fused = lrp(model, x, gradients=True)
    assert set(eager.by_layer) == set(fused.by_layer)
    for name, values in eager.by_layer.items():
        torch.testing.assert_close(values, fused.by_layer[name], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(eager.gradients[name], fused.gradients[name], rtol=1e-4, atol=1e-6)
    alone = torch.cat([lrp(model, x[n : n + 1]).input for n in range(len(x))])
    torch.testing.assert_close(fused.input, alone, rtol=1e-5, atol=1e-7)


def test_relevance_inside_a_block_adds_up() -> None:
    model, batches = ZOO["vit"]()
    model.double()
    found = lrp(model, batches[0]["pixel_values"].double())
    own = {
        k.removeprefix("vit.layers.0.attention"): float(v.sum())
        for k, v in found.by_layer.items()
        if "layers.0.attention" in k
    }
    # The values' product gives half of its relevance to the scores, and those half of theirs to the query.
    assert own[":values"] == pytest.approx(own[".o_proj"], rel=1e-6)
    assert own[":scores"] == pytest.approx(own[":values"] / 2, rel=1e-6)
    assert own[".v_proj"] == pytest.approx(own[":values"] / 2, rel=1e-6)
    assert own[".q_proj"] == pytest.approx(own[":scores"] / 2, rel=1e-6)
    assert own[".k_proj"] == pytest.approx(own[":scores"] / 2, rel=1e-6)


def test_masked_scores_of_shifted_windows_get_nothing() -> None:
    model, batches = ZOO["swin"]()
    model.double()
    found = lrp(model, batches[0]["pixel_values"].double())
    blocks = "swin.encoder.layers.0.blocks"
    plain, shifted = (found.by_layer[f"{blocks}.{n}.attention:scores"] for n in (0, 1))
    assert not (plain == 0).any()
    assert model.get_submodule(f"{blocks}.1").shift_size == 2
    masked = shifted.abs() < 1e-30
    # Of the four windows of 16 tokens one is whole, two are cut in half and one is cut in four.
    assert masked[:4].double().mean() == pytest.approx((0 + 1 / 2 + 1 / 2 + 3 / 4) / 4)


class Twice(nn.Module):
    """One layer that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(5, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.shared(self.shared(x).relu()).relu())
        return out


def test_a_layer_that_runs_twice_has_both_calls() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = Twice().double()
    found = lrp(model, torch.rand(4, 5).double(), target=0, attention=False, gradients=True)
    assert found.by_layer["shared"].shape == found.gradients["shared"].shape == (4, 2, 5)
    torch.testing.assert_close(found.by_layer["shared"].sum((1, 2)), 2 * found.total, rtol=1e-5, atol=1e-5)
    assert contributions(found, "share")["shared"] == pytest.approx(8.0, rel=1e-5)


def test_gradients_are_those_of_the_logit() -> None:
    model, batches = ZOO["vit"]()
    model.double()
    x = batches[0]["pixel_values"].double()
    found = lrp(model, x, target=2, gradients=True)
    assert found.target.tolist() == [2, 2]
    held: list[Tensor] = []
    layer = model.get_submodule("vit.layers.1.mlp.fc1")
    handle = layer.register_forward_hook(lambda _m, _a, output: held.append(output))
    score = model(x).logits[:, 2].sum()
    handle.remove()
    (expected,) = torch.autograd.grad(score, held)
    torch.testing.assert_close(found.gradients["vit.layers.1.mlp.fc1"], expected)
    by_hand = float((expected * found.by_layer["vit.layers.1.mlp.fc1"]).clamp(min=0).sum())
    assert contributions(found)["vit.layers.1.mlp.fc1"] == pytest.approx(by_hand)


def test_low_precision_models_are_followed_in_float32() -> None:
    model, batches = ZOO["vit"]()
    model.to(torch.bfloat16)
    x = batches[0]["pixel_values"].to(torch.bfloat16)
    rough = lrp(model, x)
    assert rough.input.dtype == torch.float32 and rough.leak < 1e-3
    exact = lrp(copy.deepcopy(model).float(), x.float())
    torch.testing.assert_close(rough.input, exact.input)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert sum(lrp_contribution(model, [x]).values()) == pytest.approx(1.0)


class Odd(nn.Module):
    """Operations written in other ways: in place, cat, stack, pad, mean, a learned factor, products of both."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.ones(1, 1, 6) * 0.3)
        self.inner = nn.Linear(6, 6)
        self.factor = nn.Parameter(torch.full((6,), 0.7))
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        y = self.inner(x)
        y += x
        y = y * self.factor / 2.0 + 1.0
        scores = (y @ y.mT * 0.1).softmax(-1)
        y = y + torch.bmm(scores, y)
        gate = y * torch.sigmoid(y)
        left, right = torch.stack([gate, y], -1).unbind(-1)
        joined = torch.cat([left, right], -1)
        joined = F.pad(joined, (0, 0, 0, 1)).roll(1, 1)[:, 1:]
        out: Tensor = self.head(joined.mean(1))
        return out


def test_other_spellings_conserve_too() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Odd().double()
    (x,) = draw(5, (3, 4, 6))
    found = lrp(model, x.abs(), gradients=True)
    assert found.leak < 1e-6
    assert set(found.by_layer) == {"inner", "head", ":scores", ":values"}


@pytest.mark.parametrize("kind", ["grad_positive", "share", "abs"])
def test_contributions_sum_to_one(kind: str) -> None:
    model, batches = ZOO["vit"]()
    omega = lrp_contribution(model, batches, kind)  # type: ignore[arg-type]
    assert sum(omega.values()) == pytest.approx(1.0)
    assert all(value >= 0 for value in omega.values())
    weights = {ref.path for ref in treatable(model)}
    modules = {ref.path for ref in list_layers(model) if ref.kind == "attention"}
    assert weights <= set(omega)
    assert {f"{path}:{part}" for path in modules for part in ("scores", "values")} <= set(omega)
    pairs = [(b["pixel_values"], b["labels"]) for b in batches]
    assert lrp_contribution(model, pairs, kind) == omega  # type: ignore[arg-type]


def test_scores_are_contribution_times_noise(tmp_path: Any) -> None:
    model, batches = ZOO["vit"]()
    from layerwright.core.calibration import as_calibration

    refs = treatable(model)
    options: tuple[Treatments, ...] = tuple((Quantize(b, method="rtn"), RoundActivations(b)) for b in (3, 4, 5))
    calibration = as_calibration(batches)
    subject = Subject(model, calibration, refs, {ref.path: options for ref in refs})
    scores = SCORERS.get("lrp")(subject)
    omega = lrp_contribution(model, batches)
    for ref in refs:
        for bits, option in zip((3, 4, 5), options, strict=True):
            assert scores.damage(ref.path, option) == pytest.approx(omega[ref.path] * 4.0**-bits)
    linear = SCORERS.get("lrp")(subject, noise="linear")
    assert linear.damage(refs[0].path, options[0]) == pytest.approx(omega[refs[0].path] * 13)
    drops = {refs[0].path: {3: 2.0, 4: 1.0}}
    mixed = SCORERS.get("lrp")(subject, sensitivity=drops, weight=0.5)
    assert mixed.damage(refs[0].path, options[1]) == pytest.approx(omega[refs[0].path] * 4.0**-4 + 0.25)
    read = Scores.load(scores.save(tmp_path))
    assert read.damages == scores.damages and read.sensitivities == scores.sensitivities
    assert read.meta["loss_units"] is False
    sparse = Subject(model, calibration, refs, {refs[0].path: ((Sparsify(0.5),),)})
    with pytest.raises(InputError, match="judges widths only"):
        SCORERS.get("lrp")(sparse)


def test_logit_start_and_its_fallback() -> None:
    model, batches = ZOO["vit"]()
    x = batches[0]["pixel_values"]
    found = lrp(model, x, start="logit")
    torch.testing.assert_close(found.total, model(x).logits.max(-1).values.detach())
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.zero_()
    with pytest.warns(UserWarning, match="starts from 1"):
        silent = lrp(model, x, start="logit")
    assert silent.total.tolist() == [1.0, 1.0]


def test_bad_input() -> None:
    model, batches = ZOO["vit"]()
    x = batches[0]["pixel_values"]
    with pytest.raises(InputError, match="class 3, the model has classes 0 to 2"):
        lrp(model, x, target=3)
    with pytest.raises(InputError, match="class -1"):
        lrp(model, x, target=torch.tensor([0, -1]))
    with pytest.raises(InputError, match="expected one class or 2"):
        lrp(model, x, target=torch.zeros(5, dtype=torch.long))
    with pytest.raises(InputError, match="alpha1beta0"):
        lrp(model, x, rules="alpha2beta0")
    with pytest.raises(InputError, match="kind"):
        lrp_contribution(model, batches, "loud")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="calibration"):
        lrp_contribution(model, [])
    resnet, images = ZOO["resnet"]()
    with pytest.raises(TypeError, match="ResNetForImageClassification: no attention was recognised"):
        lrp(resnet, images[0]["pixel_values"])
    llama, texts = ZOO["llama"]()
    with pytest.raises(TypeError, match="LlamaForCausalLM: relevance"):
        lrp_contribution(llama, texts)
    odd = nn.Sequential(nn.Linear(4, 4), nn.LogSoftmax(-1))
    with pytest.raises(TypeError, match=r"1: relevance cannot pass through log_softmax"):
        lrp(odd, torch.rand(2, 4), attention=False)


def test_the_room_explain_opens_the_same_door() -> None:
    assert explain_lrp is lrp


def test_256_images_take_seconds() -> None:
    from layerwright.data.demo_data import digits
    from layerwright.data.loading import load

    model, _ = load("demo:vit", dtype="float32")
    batches = [{"pixel_values": part} for part in digits("train")[0][:256].split(32)]
    begun = time.process_time()  # of all threads: what else the machine does must not count
    omega = lrp_contribution(model, batches)
    assert time.process_time() - begun < 10
    assert sum(omega.values()) == pytest.approx(1)
