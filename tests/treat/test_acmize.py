"""Models whose feed-forward parts and projections were made adaptive: where, how wide, on disk and at work."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import layerwright as lw
from layerwright.core.calibration import evaluating
from layerwright.nn.adaptive import AdaptiveComputationModule, PassOn
from layerwright.score.costs import count_flops
from layerwright.treat._adaptive_sites import find_sites
from layerwright.treat.acmize import ACMHandle, acmize, find_acm, learner_width
from layerwright.tune._acm_phases import watch_parts
from zoo import ZOO

WHOLE = ["clip", "deit", "distilbert", "falcon", "gemma2", "gpt2", "gpt_neox", "llama", "mistral", "phi3", "qwen2"]
WHOLE += ["swin", "t5", "vit"]
SCATTERED = ["albert", "bart", "bert", "opt", "roberta", "whisper"]
SLICED = ["albert", "bart", "bert", "deit", "distilbert", "falcon", "gpt2", "gpt_neox", "opt", "swin", "t5", "vit"]


def loss(model: nn.Module, batches: Any) -> float:
    return lw.Calibration(batches).mean_loss(model)


def handle_of(model: nn.Module) -> ACMHandle:
    handle = find_acm(model)
    assert handle is not None
    return handle


@pytest.mark.parametrize("name", [*WHOLE, *SCATTERED])
def test_models_run_learn_and_stay_as_they_were(name: str) -> None:
    model, batches = ZOO[name]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    adaptive, names = acmize(model, "mlp+attention", seed=3)
    kinds = [site.kind for site in find_sites(model, "mlp+attention")]
    assert {"mlp", "projection"} == set(kinds)
    assert len(names) == len(kinds)
    handle = handle_of(adaptive)
    assert tuple(handle.modules) == names
    data = lw.Calibration(batches)
    with evaluating(adaptive), handle.learning(0):
        data.loss(adaptive, batches[0]).backward()
    gates = [parameter.grad for module in handle.modules.values() for parameter in module.gate.parameters()]
    assert sum(grad is not None and bool(grad.any()) for grad in gates) > len(gates) / 2
    assert torch.isfinite(torch.tensor(loss(adaptive, batches)))
    assert 0 < handle.executed_fraction() < 1
    for kind, module in zip(kinds, handle.modules.values(), strict=True):
        assert module.min_learners == (kind == "projection")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(isinstance(module, AdaptiveComputationModule) for module in model.modules())


@pytest.mark.parametrize("name", SLICED)
def test_slices_of_the_original_compute_what_it_did(name: str) -> None:
    model, batches = ZOO[name]()
    adaptive, names = acmize(model, "mlp", first_weights="sliced")
    handle = handle_of(adaptive)
    data = lw.Calibration(batches)
    with handle.fixed(1.0):
        assert loss(adaptive, batches) == pytest.approx(loss(model, batches), abs=2e-5)
    seen: dict[str, float] = {}

    def see(path: str, x: Tensor, y: Tensor, _real: Tensor | None) -> None:
        errors = (handle.modules[path].prefixes(x) - y[..., None, :]).norm(dim=-1)
        assert errors[..., :-1].max() > 1e-3
        seen[path] = float((errors[..., -1] / y.norm(dim=-1)).max())

    with torch.no_grad(), evaluating(model), watch_parts(model, handle.inputs, see):
        data.forward(model, batches[0])
    assert set(seen) == set(names)
    assert max(seen.values()) < 1e-4


def test_slices_of_projections_are_their_best_approximations() -> None:
    model, _ = ZOO["gpt2"]()
    adaptive, names = acmize(model, "attention", first_weights="sliced")
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    for path in names:
        module, old = adaptive.get_submodule(path), model.get_submodule(path)
        weight: Any = old.weight
        values = torch.linalg.svdvals(weight.detach())
        rank = min(32, module.num_learners * module.hidden_per_learner)
        change = module.down.weight @ module.up.weight - weight.t()
        assert float(change.detach().square().sum()) == pytest.approx(float(values[rank:].square().sum()), rel=1e-4)
        errors = (module(x, mode="all") - old(x)[..., None, :]).detach().square().mean((0, 1, 3))
        assert bool((errors[1:] <= errors[:-1] + 1e-6).all())


@pytest.mark.parametrize(
    ("name", "role", "width"),
    [("vit", "mlp", 64 // 4), ("llama", "mlp", 64 * 3 // 8), ("gpt2", "mlp", 128 // 4), ("phi3", "mlp", 64 * 3 // 8)],
)
def test_learners_of_a_feed_forward_part_cost_what_it_did(name: str, role: str, width: int) -> None:
    model, _ = ZOO[name]()
    adaptive, names = acmize(model, role)
    for path in names:
        module = adaptive.get_submodule(path)
        assert module.hidden_per_learner == width
    half, _ = acmize(model, role, 2, 0.5)
    assert all(m.hidden_per_learner == width for m in handle_of(half).modules.values())


@pytest.mark.parametrize("sides", [(32, 32), (16, 32), (96, 32)])
def test_learners_of_a_projection_have_as_many_parameters(sides: tuple[int, int]) -> None:
    out, in_ = sides
    model, _ = ZOO["gpt2" if out == 96 else "llama"]()
    for site in find_sites(model, "attention"):
        if (site.out_dim, site.dim) == sides:
            width = learner_width(site, 1)
            assert abs(width * (in_ + 1 + out) - (in_ * out + out)) <= (in_ + 1 + out) / 2
    site = find_sites(model, "attention")[-1]
    assert learner_width(site, 4) == max(1, round((32 * 32 + 32) / (4 * 65)))


@pytest.mark.parametrize("name", ["vit", "bert", "llama", "gpt2", "bart"])
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model, batches = ZOO[name]()
    adaptive, names = acmize(model, "mlp+attention", first_weights="random", seed=1)
    lw.save(adaptive, tmp_path / "out")
    loaded, _ = lw.load(tmp_path / "out")
    handle = handle_of(loaded)
    assert tuple(handle.modules) == names
    assert handle.inputs == handle_of(adaptive).inputs
    assert loss(loaded, batches) == pytest.approx(loss(adaptive, batches), abs=1e-6)
    assert handle.usage().keys() == set(names)
    for path, module in handle.modules.items():
        assert module.spec() == handle_of(adaptive).modules[path].spec()


def test_a_cache_gives_what_a_full_pass_gives() -> None:
    model, _ = ZOO["llama"]()
    adaptive, _ = acmize(model, "mlp+attention", seed=2)
    ids = torch.arange(10, 20)[None]
    generated = adaptive.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(generated, adaptive.generate(ids, max_new_tokens=8, do_sample=False, use_cache=False))


@pytest.mark.parametrize("targets", ["mlp", "mlp+attention"])
@pytest.mark.parametrize("name", ["vit", "bert", "llama"])
def test_operations_of_the_whole_model(name: str, targets: str) -> None:
    model, batches = ZOO[name]()
    adaptive, names = acmize(model, targets)
    data = lw.Calibration(batches)
    handle = handle_of(adaptive)
    found = handle.flops(lambda: data.forward(adaptive, batches[0]))
    assert set(found) == {"rest", *names}
    assert found.total == count_flops(adaptive, lambda: data.forward(adaptive, batches[0]))[""]
    dense = count_flops(model, lambda: data.forward(model, batches[0]))[""]
    sites = find_sites(model, targets)
    replaced = {site.path: 2 * site.weights for site in sites}
    tokens = {path: module.last.choice.numel() for path, module in handle.modules.items() if module.last is not None}
    assert found["rest"] == dense - sum(replaced[path] * tokens[path] for path in names)
    with handle.fixed(0):
        nothing = handle.flops(lambda: data.forward(adaptive, batches[0]))
    assert nothing.total == nothing["rest"] == found["rest"]


def test_padding_is_left_out_of_usage() -> None:
    model, batches = ZOO["llama"]()
    adaptive, _ = acmize(model)
    handle = handle_of(adaptive)
    ids = batches[0]["input_ids"]
    with torch.no_grad():
        adaptive(ids, attention_mask=torch.ones_like(ids))
        alone = handle.usage()
        handle.reset()
        padded = torch.cat([ids, torch.zeros_like(ids)], 1)
        mask = torch.cat([torch.ones_like(ids), torch.zeros_like(ids)], 1)
        adaptive(padded, attention_mask=mask)
    assert all(torch.equal(alone[path], shares) for path, shares in handle.usage().items())
    first = next(iter(handle.modules.values()))
    assert first.counts is not None
    assert int(first.counts.sum()) == ids.numel()
    handle.reset()
    assert first.counts is None
    assert first.last is None


def test_one_width_for_all() -> None:
    model, batches = ZOO["vit"]()
    adaptive, _ = acmize(model)
    handle = handle_of(adaptive)
    losses = {}
    for width in (0, 1, 4, 0.25, 1.0):
        handle.reset()
        with handle.fixed(width):
            losses[repr(width)] = loss(adaptive, batches)
        share = width / 4 if isinstance(width, int) else width
        assert handle.executed_fraction() == pytest.approx(share)
    assert losses["1"] == losses["0.25"]
    assert losses["4"] == losses["1.0"]
    assert len({losses["0"], losses["1"], losses["4"]}) == 3
    with pytest.raises(ValueError, match="mode"), handle.fixed(5):
        pass


def test_copies_and_gradient_checkpointing_keep_working() -> None:
    model, batches = ZOO["llama"]()
    adaptive, _ = acmize(model, "mlp+attention")
    twin = copy.deepcopy(adaptive)
    handle = handle_of(twin)
    handle.calls.number = handle_of(adaptive).calls.number
    grads = []
    for network in (adaptive, twin):
        if network is twin:
            network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        network.train()
        with handle_of(network).learning(seed=4):
            lw.Calibration(batches).loss(network, batches[0]).backward()
        grads.append([p.grad for p in network.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads, strict=True))


def test_named_targets() -> None:
    model, batches = ZOO["bert"]()
    adaptive, names = acmize(model, ["intermediate", "bert.encoder.layer.1.attention.self.query"])
    assert names == (
        "bert.encoder.layer.0.output.dense",
        "bert.encoder.layer.1.attention.self.query",
        "bert.encoder.layer.1.output.dense",
        "bert.encoder.layer.2.output.dense",
    )
    assert isinstance(adaptive.get_submodule("bert.encoder.layer.0.intermediate"), PassOn)
    assert torch.isfinite(torch.tensor(loss(adaptive, batches)))
    plain = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    changed, found = acmize(plain, "0")
    assert found == ("0",)
    assert changed(torch.randn(4, 8)).shape == (4, 3)
    same, _ = acmize(plain, "0", copy=False)
    assert same is plain


@pytest.mark.parametrize(
    "target", ["bert.embeddings.word_embeddings", "bert.encoder.layer.0", "LayerNorm", "classifier", "attention"]
)
def test_what_cannot_be_adaptive(target: str) -> None:
    model, _ = ZOO["bert"]()
    with pytest.raises(TypeError, match="targets"):
        acmize(model, [target])


@pytest.mark.parametrize("name", ["mixtral", "bloom", "resnet"])
def test_models_without_such_parts(name: str) -> None:
    model, _ = ZOO[name]()
    with pytest.raises(TypeError, match="targets"):
        acmize(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_learners": 0}, "num_learners"),
        ({"total_flops": 0.0}, "total_flops"),
        ({"tau": 0.0}, "tau"),
        ({"min_learners": 5}, "min_learners"),
        ({"targets": "mlp+attention", "min_learners": 0}, "h_0 = 0"),
        ({"targets": "mpl"}, "mlp"),
        ({"targets": []}, "targets"),
        ({"first_weights": "slices"}, "sliced"),
        ({"first_weights": "sliced", "total_flops": 0.5}, "first_weights"),
        ({"activation": "geluu"}, "gelu"),
    ],
)
def test_bad_settings(options: Any, message: str) -> None:
    model, _ = ZOO["vit"]()
    with pytest.raises(ValueError, match=message):
        acmize(model, **options)


def test_no_learner_outside_a_residual_branch_is_refused() -> None:
    with pytest.raises(ValueError, match="zero the signal"):
        acmize(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), "0", min_learners=0)
    model, _ = ZOO["llama"]()
    adaptive, _ = acmize(model, ["o_proj"], min_learners=0)
    assert all(module.min_learners == 0 for module in handle_of(adaptive).modules.values())
    with pytest.raises(ValueError, match="adaptive modules already"):
        acmize(adaptive)
    with pytest.raises(ValueError, match="no adaptive modules"):
        ACMHandle(model)
    assert find_acm(model) is None


def test_gated_parts_cannot_be_sliced() -> None:
    for name in ("llama", "phi3"):
        model, _ = ZOO[name]()
        with pytest.raises(ValueError, match="cannot be cut into slices"):
            acmize(model, first_weights="sliced")
