"""Biases that a preparation makes are in the costs: to the byte, and within the budget."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from layerwright.core.budget import Budget
from layerwright.core.calibration import Calibration, as_calibration
from layerwright.core.layers import list_layers, parameter_bytes, treatable
from layerwright.core.treatment import Quantize
from layerwright.recipes.bench import Bench
from layerwright.recipes.book import recipe
from layerwright.recipes.job import decide, prepared
from layerwright.recipes.prepared import prepared_limits, prepared_profile
from layerwright.score.costs import profile_model
from layerwright.treat.apply import apply_plan
from zoo import ZOO

MERGING = "swin.encoder.layers.0.downsample.reduction"
DESCENT = {"widths": [8, 4], "samples": 2, "attention": False}


def swin() -> tuple[nn.Module, Calibration]:
    model, batches = ZOO["swin"]()
    return model, as_calibration(batches[:1])


def made_bytes(model: nn.Module) -> int:
    reader = model.get_submodule(MERGING)
    assert isinstance(reader, nn.Linear)
    return 4 * reader.out_features


@pytest.fixture(scope="module")
def bench() -> Bench:
    model, data = swin()
    return Bench(model, None, data, data, "swin")


def test_rows_and_total_are_those_of_the_prepared_model(bench: Bench) -> None:
    chosen = recipe("mptq_vit")
    before = profile_model(bench.model, timing=False)
    working = prepared(bench, chosen, 0)
    assert bench.model.get_submodule(MERGING).bias is None
    assert working.model.get_submodule(MERGING).bias is not None
    found = prepared_profile(before, bench.model, working.model)
    exact = profile_model(working.model, timing=False)
    assert [(r.ref.path, r.cost.params, r.cost.bytes) for r in found] == [
        (r.ref.path, r.cost.params, r.cost.bytes) for r in exact
    ]
    assert found.total == exact.total
    assert found.total.bytes - before.total.bytes == made_bytes(bench.model)
    assert found.fingerprint == before.fingerprint != exact.fingerprint
    changed = {row.ref.path for row, old in zip(found, before, strict=True) if row.cost != old.cost}
    assert MERGING in changed and all(MERGING.startswith(path) for path in changed)
    assert prepared_profile(before, bench.model, bench.model) is before


def test_shares_are_of_the_model_as_it_was_given(bench: Bench) -> None:
    refs = treatable(bench.model)
    before = profile_model(bench.model, timing=False).total
    after = dataclasses.replace(before, bytes=before.bytes + 64)

    def bound(budget: str, resource: str = "bytes") -> float:
        return prepared_limits(Budget.parse(budget), before, after, refs, -1, 4)[resource]

    assert bound("size=0.5x") == before.bytes / 2 and bound("size=20kb") == 20_000
    plain = prepared_limits(Budget.parse("bits=4"), before, before, refs, -1, 4)["bytes"]
    assert bound("bits=4") == plain + 64
    assert bound("bits=4,params=0.5x") == bound("bits=4")
    assert bound("bits=4,params=0.5x", "params") == before.params / 2


@pytest.mark.parametrize("budget", ["bits=6", "size=0.3x"])
@pytest.mark.parametrize("name", ["mptq_vit", "lrp_qvit"])
def test_the_plan_s_bytes_are_those_of_the_result(bench: Bench, name: str, budget: str) -> None:
    chosen = recipe(name)
    if chosen.decider:
        chosen = dataclasses.replace(chosen, decider_settings=DESCENT)
    else:
        chosen = dataclasses.replace(chosen, score_samples=2, attention=())
    decision = decide(bench, budget, chosen)
    treated, _ = apply_plan(bench.model, decision.plan, bench.calibration)
    assert parameter_bytes(treated) == decision.allocation.cost.bytes <= decision.limits["bytes"]
    made = set(treated.state_dict()) - set(bench.model.state_dict())
    assert f"{MERGING}.bias" in made
    original = decision.table.original.bytes
    assert original == parameter_bytes(bench.model) == decision.profile.total.bytes
    if budget == "size=0.3x":
        assert decision.limits["bytes"] == pytest.approx(0.3 * original)
    assert any(isinstance(t, Quantize) for t in decision.plan.layers[MERGING])


def test_a_norm_gets_its_weight_counted() -> None:
    model = nn.Sequential(nn.LayerNorm(8, elementwise_affine=False), nn.Linear(8, 8, bias=False), nn.Linear(8, 3))
    data = as_calibration([torch.randn(6, 8, generator=torch.Generator().manual_seed(0))])
    before = profile_model(model, refs=list_layers(model), timing=False)
    chosen = dataclasses.replace(recipe("mptq_vit"), prepare={"smooth": {"shift": True}})
    working = prepared(Bench(model, None, data, data, "net"), chosen, 0)
    found = prepared_profile(before, model, working.model)
    # 8 factors and 8 shifts in the norm, which no row had, and 8 biases in its reader.
    assert found.total.bytes == parameter_bytes(working.model) == before.total.bytes + 4 * 24
    assert found["1"].cost.bytes == before["1"].cost.bytes + 4 * 8
