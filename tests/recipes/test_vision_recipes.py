"""The recipes for vision transformers on DeiT and Swin: planned, carried out, and what their parts put where."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerwright.core.calibration import Calibration, as_calibration, logits_of
from layerwright.core.layers import list_layers, parameter_bytes, treatable
from layerwright.core.storage import activation_bytes
from layerwright.core.treatment import Quantize, RoundActivations, RoundAttention
from layerwright.nn.activation import InputQuantizer
from layerwright.nn.attached import attached
from layerwright.nn.attention_products import AttentionProducts
from layerwright.recipes.bench import Bench
from layerwright.recipes.book import recipe
from layerwright.recipes.job import decide
from layerwright.score.relevance import lrp, lrp_contribution
from layerwright.treat.apply import apply_plan
from layerwright.tune.evolq import EvolQ
from zoo import ZOO, logits

MODELS = ("deit", "swin")
SETTINGS: dict[str, dict[str, Any]] = {
    "mptq_vit": {"decider_settings": {"widths": [8, 4], "two_regions": True, "metric": "kl", "samples": 2}},
    "lrp_qvit": {"score_samples": 4},
    "evol_q": {"decider_settings": {"widths": [8, 4], "activation_bits": 8, "symmetric": False, "norms": True}},
}


def louder(name: str) -> tuple[nn.Module, Calibration]:
    """A network of the zoo whose norms differ by channel, and its images."""
    model, batches = ZOO[name]()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.mul_((0.5 * torch.randn(len(module.weight), generator=generator)).exp())
                module.bias.add_(torch.randn(len(module.bias), generator=generator))
            elif isinstance(module, nn.Linear):
                module.weight.mul_(2)
    return model, as_calibration(batches)


def check_two_regions(name: str, model: nn.Module, treated: nn.Module, data: Calibration) -> None:
    """OPT-m's grids stand after every softmax and every GELU, and nowhere else."""
    refs = list_layers(model)
    behind_gelu = {ref.path for ref in refs if ref.role == "down"}
    assert len(behind_gelu) == (3 if name == "deit" else 4)
    grids = {
        path: beside.quantizer
        for path, module in treated.named_modules()
        if isinstance(beside := attached(module, "input_quantizer"), InputQuantizer)
    }
    assert {path for path, grid in grids.items() if grid.kind == "two_region"} == behind_gelu
    assert all(grids[path].signed for path in behind_gelu)
    for path in (ref.path for ref in refs if ref.kind == "attention"):
        products = attached(treated.get_submodule(path), "products")
        assert isinstance(products, AttentionProducts)
        kinds = {operand: quantizer.kind for operand, quantizer in products.quantizers.items()}
        assert kinds == {"query": "uniform", "key": "uniform", "probabilities": "two_region", "value": "uniform"}
        probabilities = products.quantizers["probabilities"]
        assert not probabilities.signed and int(probabilities.ratio) >= 0
    # The probabilities that a shifted window masks stay exactly 0.
    seen: list[Tensor] = []
    watched = [m for m in treated.modules() if isinstance(m, AttentionProducts)]
    handles = [
        m.quantizers["probabilities"].register_forward_hook(lambda _m, a, o: seen.append(o[a[0] == 0])) for m in watched
    ]
    logits(treated, next(iter(data)))
    for handle in handles:
        handle.remove()
    assert len(seen) == len(watched) and all(bool((values == 0).all()) for values in seen)
    assert sum(values.numel() for values in seen) > 0 if name == "swin" else True


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("chosen", sorted(SETTINGS))
def test_recipes_plan_and_apply(name: str, chosen: str) -> None:
    model, data = louder(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    quick = dataclasses.replace(recipe(chosen), **SETTINGS[chosen])
    decision = decide(Bench(model, None, data, data, name), "bits=7", quick)
    plan = decision.plan
    treated, report = apply_plan(model, plan, data)
    assert all(record.status == "done" for record in report)
    # To the byte: weights, ranges of attention's operands and of norms, and biases that a shift makes.
    assert parameter_bytes(treated) == decision.allocation.cost.bytes
    ranges = activation_bytes(tuple(t for own in plan.layers.values() for t in own if isinstance(t, RoundAttention)))
    made = [value for key, value in treated.state_dict().items() if key.endswith("bias") and key not in before]
    assert len(made) == (1 if name == "swin" and plan.prepare else 0)  # patch merging reads its norm without a bias
    assert parameter_bytes(treated) <= decision.limits["bytes"] + (ranges if chosen == "lrp_qvit" else 0)
    layers = {ref.path for ref in treatable(model)}
    norms = {path for path, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    assert {path for path in norms if path in plan.layers} == (norms if chosen == "evol_q" else set())
    assert all(plan.layers[path][0].label() == "a8 power-of-two" for path in norms if path in plan.layers)
    modules = {ref.path for ref in list_layers(model) if ref.kind == "attention"}
    assert len(modules) == (3 if name == "deit" else 4)
    treatments = {path: plan.layers[path] for path in layers | modules}
    for path in layers:
        kinds = {type(t) for t in treatments[path]}
        # Layers that read one norm share its quantizer's width, not the quantizer: each has its own.
        assert kinds == {Quantize, RoundActivations}, path
        assert attached(treated.get_submodule(path), "input_quantizer") is not None
    assert all({type(t) for t in treatments[path]} == {RoundAttention} for path in modules)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for batch in data:
        got, wanted = logits(treated, batch), logits(model, batch)
        assert bool(got.isfinite().all()) and not torch.equal(got, wanted)
        assert float((got - wanted).norm() / wanted.norm()) < 0.3
    if chosen == "mptq_vit":
        check_two_regions(name, model, treated, data)
    if chosen == "evol_q":
        tuned, search = EvolQ(passes=1, cycles=2, seed=0).fit(treated, data, model)
        assert search.best_loss <= search.start_loss and search.history
        assert {step.block for step in search.history} == modules
        assert bool(logits(tuned, next(iter(data))).isfinite().all())


@pytest.mark.parametrize("name", MODELS)
def test_relevance_is_the_class_score_at_every_depth(name: str) -> None:
    model, data = louder(name)
    model.double()
    x = next(iter(data))["pixel_values"].double()
    found = lrp(model, x, start="logit")
    with torch.no_grad():
        score = logits_of(model(x)).max(-1).values
    # Swin's softmax is float32 in a float64 model too.
    torch.testing.assert_close(found.total, score, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.input.flatten(1).sum(1) + found.constants, score, rtol=1e-5, atol=1e-6)
    # What a block's two branches and its skip paths carry is all of it: through windows, shifts and merged patches.
    one = lrp(model, x)
    merged = [path for path in one.by_layer if path.endswith(("reduction", "classifier"))]
    assert len(merged) == (1 if name == "deit" else 2)
    for path in merged:
        torch.testing.assert_close(one.by_layer[path].flatten(1).sum(1), one.total, rtol=1e-6, atol=1e-9)
    omega = lrp_contribution(model, [{"pixel_values": x}])
    assert sum(omega.values()) == pytest.approx(1) and {ref.path for ref in treatable(model)} <= set(omega)
