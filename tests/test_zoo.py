"""The main path over every architecture of the zoo: inspect, plan, apply, measure."""

from __future__ import annotations

import copy

import pytest
import torch

from layerwright.core.calibration import Calibration
from layerwright.core.layers import treatable
from layerwright.core.recipe import Recipe
from layerwright.core.treatment import Quantize, treatments_from_data
from layerwright.recipes.bench import Bench
from layerwright.recipes.job import decide
from layerwright.recipes.measure import measure
from layerwright.score.costs import stored_bytes_of
from layerwright.treat.apply import apply_plan
from zoo import ZOO

RECIPE = Recipe(
    "small",
    candidates=tuple(
        treatments_from_data(t) for t in ({"quantize": {"bits": 3}}, {"quantize": {"bits": 8, "method": "rtn"}})
    ),
    scorer="output_error",
)


@pytest.mark.parametrize("name", sorted(ZOO))
def test_inspect_plan_apply_measure(name: str) -> None:
    model, batches = ZOO[name]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    data = Calibration(batches)
    bench = Bench(model, None, data, data, name)
    decision = decide(bench, "bits=5", RECIPE)
    treated, report = apply_plan(model, decision.plan, data)
    chosen = {path: t for path, t in decision.plan.layers.items() if t}
    assert chosen
    assert len(report) == len(chosen)
    assert all(record.status == "done" for record in report), str(report)
    assert stored_bytes_of(treated) == decision.allocation.cost.bytes
    measured = measure({"before": model, "after": treated}, data, timing=False)
    assert measured["after"].bytes < measured["before"].bytes
    assert torch.isfinite(torch.tensor(measured["after"].loss))
    assert abs(measured["after"].loss - measured["before"].loss) < 0.5 * abs(measured["before"].loss) + 0.5
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), f"{key} of the model that was given changed"


@pytest.mark.parametrize("name", sorted(ZOO))
def test_packed_model_equals_its_simulation(name: str) -> None:
    model, batches = ZOO[name]()
    plan = {ref.path: (Quantize(8, method="rtn"),) for ref in treatable(model)}
    packed, _ = apply_plan(model, plan, None)
    simulated, _ = apply_plan(copy.deepcopy(model), plan, None, simulate=True)
    data = Calibration(batches)
    assert data.mean_loss(packed) == pytest.approx(data.mean_loss(simulated), rel=2e-3, abs=2e-3)
