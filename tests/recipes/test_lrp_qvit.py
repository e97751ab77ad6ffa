"""Recipe lrp_qvit: widths by relevance, for layers and for the products of attention; refused where it cannot serve."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from layerwright.core.calibration import as_calibration
from layerwright.core.cost import Cost
from layerwright.core.errors import BudgetError, InputError
from layerwright.core.layers import list_layers, treatable
from layerwright.core.option import Allocation, Option, Scores
from layerwright.core.storage import activation_bytes
from layerwright.core.treatment import Quantize, RoundActivations, RoundAttention
from layerwright.recipes.attention_sites import mean_bits, product_bits, with_attention_bits
from layerwright.recipes.bench import open_bench
from layerwright.recipes.book import recipe
from layerwright.recipes.job import decide
from layerwright.recipes.needs import NEEDS, has, require
from layerwright.score.relevance.contribution import quantization_noise
from layerwright.treat.apply import apply_plan
from zoo import ZOO, logits, on_meta


def test_product_bits_are_the_best_of_all() -> None:
    paths = ["a", "b"]
    names = ["a:scores", "a:values", "b:scores", "b:values"]
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        numbers = torch.rand(4, generator=generator).pow(3).tolist()
        omega = dict(zip(names, numbers, strict=True))
        sizes = {name: float(n) for name, n in zip(names, torch.randint(1, 5, (4,), generator=generator), strict=True)}
        found = product_bits(omega, paths, 4, sizes)

        def noise(bits: tuple[int, ...], omega: dict[str, float] = omega) -> float:
            return sum(omega[n] * quantization_noise(b) for n, b in zip(names, bits, strict=True))

        best = min(
            noise(bits)
            for bits in itertools.product((3, 4, 5), repeat=4)
            if sum(b * sizes[n] for n, b in zip(names, bits, strict=True)) <= 4 * sum(sizes.values())
        )
        assert noise(tuple(found[n] for n in names)) == pytest.approx(best, rel=1e-5)
    assert set(product_bits(omega, paths, 8).values()) <= {7, 8}
    assert set(product_bits(omega, paths, 2).values()) == {2}


def test_attention_gets_the_layers_mean_width() -> None:
    model, _ = ZOO["vit"]()
    refs = list_layers(model)
    layers = treatable(model, refs)
    chosen = tuple(Option(ref.path, (Quantize(5), RoundActivations(5)), Cost(), 0.0) for ref in layers)
    allocation = Allocation(chosen, Cost(), 0.0)
    assert mean_bits(allocation, refs) == 5
    assert mean_bits(Allocation((), Cost(), 0.0), refs) == 8
    modules = [ref.path for ref in refs if ref.kind == "attention"]
    omega = {f"{path}:{part}": 0.5**n for n, path in enumerate(modules) for part in ("scores", "values")}
    rule = (RoundAttention(6, "log_sqrt2"),)
    plain = with_attention_bits(allocation, refs, rule, None)
    assert [o.treatments for o in plain.chosen[-3:]] == [rule] * 3
    found = with_attention_bits(allocation, refs, rule, Scores("lrp", {}, omega))
    products = [o.treatments[0] for o in found.chosen if o.layer in modules]
    assert all(isinstance(t, RoundAttention) and t.probabilities == "log_sqrt2" for t in products)
    widths = [w for t in products if isinstance(t, RoundAttention) for w in (t.bits, t.key_bits or 0)]
    assert sum(widths) <= 5 * len(widths) and max(widths) == 6 and widths[0] == 6
    assert found.cost.bytes == plain.cost.bytes
    assert with_attention_bits(allocation, refs, (), None) is allocation


def test_it_plans_and_applies_on_the_demo_model() -> None:
    bench = open_bench("demo:vit", samples=32)
    decision = decide(bench, "bits=4", "lrp_qvit")
    plan = decision.plan
    assert plan.prepare["reparameterize"]["rule"] == "std"
    pairs = [(t[0].bits, t[1].bits) for t in plan.layers.values() if len(t) == 2]  # type: ignore[attr-defined]
    assert len(pairs) == 48 and all(weight == rounded for weight, rounded in pairs)
    assert len(set(pairs)) > 1
    assert sum(isinstance(t, RoundAttention) for own in plan.layers.values() for t in own) == 8
    small, report = apply_plan(bench.model, plan, bench.calibration)
    assert not report.failed if hasattr(report, "failed") else True
    loss = bench.calibration.mean_loss(small)
    assert loss < bench.calibration.mean_loss(bench.model) + 0.15
    with pytest.raises(BudgetError):
        decide(bench, "bits=2", "lrp_qvit")


def test_it_comes_down_to_three_bits() -> None:
    bench = open_bench("demo:vit", samples=32)
    chosen = dataclasses.replace(recipe("lrp_qvit"), score_samples=16)
    decision = decide(bench, "bits=3", chosen)
    widths = {t.bits for own in decision.plan.layers.values() for t in own if isinstance(t, Quantize)}
    ranges = activation_bytes((RoundAttention(),)) * 8  # of attention's operands, which no layer answers for
    assert {2, 3} <= widths and decision.allocation.cost.bytes <= decision.limits["bytes"] + ranges


def test_needs_are_seen_on_the_meta_device() -> None:
    expected = {"vit", "deit", "swin"}
    for name in ("vit", "deit", "swin", "llama", "bert", "resnet", "clip", "whisper", "convnext"):
        assert has("vision_transformer", on_meta(name)) == (name in expected), name
    assert has("batchnorm", on_meta("resnet")) and not has("batchnorm", on_meta("vit"))
    assert has("decoder", on_meta("llama")) and not has("decoder", on_meta("vit"))
    assert has("blocks", on_meta("vit")) and not has("blocks", torch.nn.Linear(8, 8))
    assert has("labels", on_meta("vit"))  # what is not about the model is not refused here
    known = {"batchnorm", "blocks", "convolutions", "decoder", "kv_cache", "linear_blocks", "linear_layers"}
    assert set(NEEDS) == known | {"vision_transformer"}


def test_a_model_that_it_cannot_serve_is_told_what_can() -> None:
    with pytest.raises(
        InputError, match=r"lrp_qvit needs a model with a vision transformer's attention, and Llama.*mixed"
    ):
        require("vision_transformer", on_meta("llama"), "lrp_qvit")
    with pytest.raises(InputError, match="needs a model with decoder, and ViT") as caught:
        require("decoder", on_meta("vit"), "shortened-llama")
    offered = str(caught.value).partition("recipes for it: ")[2].split(", ")
    assert "lrp_qvit" in offered and "shortened-llama" not in offered
    require("vision_transformer", on_meta("vit"), "lrp_qvit")
    assert recipe("lrp_qvit").needs == ("vision_transformer",)


def test_a_plan_of_it_survives_its_file(tmp_path) -> None:  # type: ignore[no-untyped-def]
    from layerwright.core.plan import Plan

    model, batches = ZOO["swin"]()
    calibration = as_calibration(batches)
    refs = list_layers(model)
    layers = {r.path: (Quantize(5, symmetric=False, method="mse"), RoundActivations(5)) for r in treatable(model, refs)}
    modules = {r.path: (RoundAttention(5, "log_sqrt2", key_bits=4),) for r in refs if r.kind == "attention"}
    plan = Plan(layers={**layers, **modules}, prepare={"reparameterize": {"bits": 5, "rule": "std", "k": 3.0}})
    read = Plan.load(plan.save(tmp_path / "plan.yaml"))
    first, _ = apply_plan(model, plan, calibration)
    second, _ = apply_plan(model, read, calibration)
    assert torch.equal(logits(first, batches[0]), logits(second, batches[0]))
