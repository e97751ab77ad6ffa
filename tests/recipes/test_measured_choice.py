"""The joint choice is held against each single kind by measuring."""

from __future__ import annotations

from dataclasses import replace

from layerwright.core.calibration import Calibration
from layerwright.core.recipe import Recipe
from layerwright.core.treatment import treatments_from_data
from layerwright.recipes.bench import Bench
from layerwright.recipes.job import decide
from layerwright.treat.apply import apply_plan
from zoo import ZOO

CANDIDATES = (
    {"quantize": {"bits": 4, "method": "rtn"}},
    {"quantize": {"bits": 8, "method": "rtn"}},
    {"low_rank": {"inner": 2, "method": "svd"}},
)


def test_what_is_taken_is_never_worse_on_the_calibration_data_than_what_was_measured() -> None:
    model, batches = ZOO["llama"]()
    data = Calibration(batches)
    bench = Bench(model, None, data, data, "llama")
    recipe = Recipe("pair", scorer="weight_error", candidates=tuple(map(treatments_from_data, CANDIDATES)))
    plain = decide(bench, "size=0.5x", recipe)
    measured = decide(bench, "size=0.5x", replace(recipe, measured_choice=True))
    losses = [
        data.mean_loss(apply_plan(model, decision.plan, data, simulate=True)[0]) for decision in (plain, measured)
    ]
    assert losses[1] <= losses[0] + 1e-6
    assert measured.allocation.cost.bytes <= measured.limits["bytes"]
    assert "taken:" in measured.plan.notes
    assert "taken:" not in plain.plan.notes
