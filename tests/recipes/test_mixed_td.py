from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from layerwright.core.calibration import Calibration
from layerwright.core.errors import BudgetError, InputError
from layerwright.core.treatment import FactorConv
from layerwright.recipes.bench import open_bench
from layerwright.recipes.factor_bench import FactorBench, search_batches
from layerwright.recipes.factor_cost import NetworkCost, StageClock, make_time
from layerwright.recipes.job import decide
from layerwright.recipes.mixed_td import Settings, mixed_td
from layerwright.score.conv_shapes import conv_shapes
from layerwright.score.dataflow import DataflowModel
from layerwright.studies.mixed_td import shape_images, shapes_network
from layerwright.treat.apply import apply_plan

DEVICE = {"dsp": 128, "bram": 256, "uram": 0}
FAST: dict[str, Any] = {
    "device": DEVICE,
    "ratios": (0.6, 0.3),
    "methods": ("svd",),
    "groups": (1,),
    "tolerance": 0.2,
    "batch_size": 64,
    "population": 8,
    "parents": 3,
    "generations": 3,
    "trees": 0,
}


@cache
def setting() -> tuple[nn.Module, Calibration]:
    model = shapes_network(8, steps=150, seed=0)
    images, labels = shape_images(128, seed=5)
    return model, Calibration(list(zip(images.split(32), labels.split(32), strict=True)), name="shapes")


def test_the_target_holds_on_the_treated_model() -> None:
    model, data = setting()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = mixed_td(
        model,
        data,
        0.6,
        settings=Settings(**{**FAST, "trees": 10, "warmup": 1, "methods": ("svd", "cp"), "ratios": (0.5,)}),
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert found.layers and found.used["ms"] <= found.limits["ms"] == pytest.approx(0.6 * found.baseline["ms"])
    small, _ = apply_plan(model, found.layers)
    images = next(iter(data))[0][:1]
    mapped = DataflowModel(**DEVICE).map(list(conv_shapes(small, lambda: small(images)).values()))
    assert mapped.latency_ms == pytest.approx(found.used["ms"])
    # What the search saw is what the plan does.
    bench = FactorBench(model, data, 64)
    right = sum(float((small(x).argmax(-1) == y).sum()) for x, y in data)
    assert bench.accuracy(found.layers) == pytest.approx(right / 128) == pytest.approx(found.accuracy)


def test_same_seed_same_choice_and_other_costs() -> None:
    model, data = setting()
    one, two = (mixed_td(model, data, 0.7, "macs", settings=Settings(**FAST), seed=3) for _ in range(2))
    assert one.layers == two.layers and one.used["macs"] <= 0.7 * one.baseline["macs"]
    both = mixed_td(model, data, {"params": 0.6 * one.baseline["params"], "macs": 0.8 * one.baseline["macs"]},
                    settings=Settings(**FAST))  # fmt: skip
    assert both.used["params"] <= both.limits["params"] and both.used["macs"] <= both.limits["macs"]
    own = mixed_td(model, data, 0.75, lambda now: sum(s.params for stages in now.values() for s in stages) ** 0.5,
                   settings=Settings(**FAST))  # fmt: skip
    assert own.used["params"] <= 0.75**2 * own.baseline["params"] * (1 + 1e-9)
    kept = mixed_td(model, data, 1.5, "macs", settings=Settings(**FAST))
    assert kept.accuracy >= kept.baseline_accuracy - 0.01


def test_admitted_candidates_keep_to_the_tolerance() -> None:
    model, data = setting()
    bench = FactorBench(model, data, 64)
    found = mixed_td(model, data, 0.7, settings=Settings(**FAST), bench=bench)
    floor = bench.batch_accuracy({}, 0) - found.tolerance
    for path, own in found.candidates.items():
        assert own[-1].treatments == ()
        families: dict[Any, list[FactorConv]] = {}
        for option in own[:-1]:
            factor = option.treatments[0]
            assert isinstance(factor, FactorConv)
            families.setdefault((factor.method, factor.scheme, factor.groups), []).append(factor)
        for family in families.values():
            smallest = min(family, key=lambda f: f.inner)
            assert bench.batch_accuracy({path: (smallest,)}, 0) >= floor
    everything = bench.admit(found.candidates, 1.0)
    assert everything == dict(found.candidates)


def test_measured_time_is_the_networks_own_where_nothing_changes() -> None:
    model, data = setting()
    batch = next(iter(data))
    shapes = conv_shapes(model, lambda: model(batch[0]))
    clock = StageClock(model, data, shapes, repeats=2)
    whole = {path: (shape,) for path, shape in shapes.items()}
    assert clock.milliseconds(whole) == clock.base
    changed = {**whole, "3": (shapes["3"], shapes["3"])} if "3" in shapes else whole
    assert clock.milliseconds(changed) != clock.base
    pricing = NetworkCost(whole, make_time("macs", model, data, shapes))
    amounts = pricing.amounts({})
    assert amounts["ms"] == amounts["macs"] == sum(shape.macs for shape in shapes.values())


def test_search_batches() -> None:
    _, data = setting()
    assert [len(y) for _, y in search_batches(data, 50)] == [50, 50, 28]
    assert [len(y) for _, y in search_batches(data, 60)] == [60, 60]
    named = Calibration([{"pixel_values": torch.zeros(3, 1, 4, 4), "labels": torch.zeros(3).long()}] * 2)
    assert [len(batch["labels"]) for batch in search_batches(named, 4)] == [4, 2]
    for bad in ([torch.zeros(2, 3)], [(torch.zeros(2, 3), torch.zeros(2))]):
        with pytest.raises(InputError, match="labels"):
            search_batches(Calibration(bad), 4)


def test_bad_input() -> None:
    model, data = setting()
    with pytest.raises(BudgetError, match=r"ms .* is below the smallest reachable"):
        mixed_td(model, data, 0.05, settings=Settings(**FAST))
    with pytest.raises(BudgetError, match="finite"):
        mixed_td(model, data, 0.0, settings=Settings(**FAST))
    with pytest.raises(InputError, match="energy"):
        mixed_td(model, data, {"energy": 1.0}, settings=Settings(**FAST))
    with pytest.raises(InputError, match=r"nn\.Conv2d"):
        mixed_td(nn.Sequential(nn.Flatten(), nn.Linear(256, 8)), data, 0.5)
    for settings, words in (({"cost": "fpga"}, "cost"), ({"scan": "up"}, "scan"), ({"tolerance": 0.0}, "tolerance")):
        with pytest.raises(InputError, match=words):
            Settings(**settings)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="did you mean population"):
        Settings.from_data({"populations": 3})
    with pytest.raises(InputError, match="device"):
        mixed_td(model, data, 0.5, settings=Settings(**{**FAST, "device": {"dsps": 3}}))
    broken = shapes_network(8, steps=1)
    with torch.no_grad():
        broken[-1].bias.fill_(float("nan"))  # type: ignore[union-attr, operator]
    assert FactorBench(broken, data).batch_accuracy({}, 0) == 0.0


def quick_recipe(**more: Any) -> Any:
    from dataclasses import replace

    from layerwright.recipes.book import recipe

    return replace(recipe("mixed_td"), decider_settings={**FAST, **more})


@pytest.mark.parametrize("budget", ["ms=0.7x", "size=0.7x", "params=0.7x", "flops=0.7x", "flops=0.8x,params=0.75x"])
def test_the_recipe_decides_on_the_demo_model(budget: str) -> None:
    bench = open_bench("demo:cnn", samples=64)
    decision = decide(bench, budget, quick_recipe(tolerance=1.0, population=4, parents=2, generations=1))
    chosen = [t for treatments in decision.plan.layers.values() for t in treatments]
    assert chosen and all(isinstance(t, FactorConv) for t in chosen)
    assert "cost dataflow" in decision.plan.notes
    small, _ = apply_plan(bench.model, decision.plan)
    predicted, limits = decision.allocation.cost, decision.limits
    if "bytes" in limits:
        bytes_ = sum(t.numel() * t.element_size() for t in small.state_dict().values())
        assert bytes_ <= limits["bytes"] + 0.5
        assert bytes_ == pytest.approx(predicted.bytes)
    if "params" in limits:
        count = sum(p.numel() for p in small.parameters())
        assert count <= limits["params"] + 0.5
        assert count == predicted.params
    if "flops" in limits:
        images = next(iter(bench.calibration))["pixel_values"][:1]
        with torch.no_grad(), FlopCounterMode(display=False) as before:
            bench.model(images)
        with torch.no_grad(), FlopCounterMode(display=False) as after:
            small(images)
        share = float(budget.split("flops=")[1].split("x")[0])
        assert after.get_total_flops() <= share * before.get_total_flops() + 1
        assert predicted.flops <= limits["flops"] * (1 + 1e-9)


def test_budgets_that_it_cannot_hold() -> None:
    bench = open_bench("demo:cnn", samples=64)
    with pytest.raises(BudgetError, match="relative"):
        decide(bench, "ms=2", quick_recipe(cost="macs"))
    with pytest.raises(BudgetError, match="takes more than all"):
        decide(bench, "size=0.001x", quick_recipe())
    with pytest.raises(BudgetError, match="smallest reachable"):
        decide(bench, "size=0.1x", quick_recipe(tolerance=1.0))
    with pytest.raises(InputError, match="onnx cannot load"):
        decide(bench, "ms=0.7x", quick_recipe(), to="onnx")
