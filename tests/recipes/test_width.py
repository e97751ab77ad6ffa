"""A narrower feed-forward part is one row of the table for its three layers, and costs what it says."""

from __future__ import annotations

import pytest

from layerwright.core.calibration import Calibration
from layerwright.core.layers import parameter_bytes
from layerwright.core.recipe import Recipe
from layerwright.core.treatment import Narrow, Quantize, treatments_from_data
from layerwright.recipes.bench import Bench
from layerwright.recipes.job import Decision, decide
from layerwright.treat.apply import apply_plan
from layerwright.treat.narrow import feed_forwards
from zoo import ZOO

CANDIDATES = (
    {"quantize": {"bits": 8, "method": "rtn"}},
    {"narrow": {"share": 0.5}},
    {"narrow": {"share": 0.5}, "quantize": {"bits": 8, "method": "rtn"}},
    {"narrow": {"share": 0.75}, "quantize": {"bits": 4, "method": "rtn"}},
    {"narrow": {"share": 0.99}},
)


def decided(name: str, budget: str, scorer: str = "fisher") -> tuple[Bench, Decision]:
    model, batches = ZOO[name]()
    data = Calibration(batches)
    bench = Bench(model, None, data, data, name)
    recipe = Recipe("narrower", scorer=scorer, candidates=tuple(map(treatments_from_data, CANDIDATES)))
    return bench, decide(bench, budget, recipe)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "phi3"])
def test_a_row_covers_the_layers_of_its_part(name: str) -> None:
    bench, decision = decided(name, "size=0.6x")
    parts = feed_forwards(bench.model)
    rows = [o for o in decision.table.options if any(isinstance(t, Narrow) for t in o.treatments)]
    # Not the pair with four bits, which the other layers are not offered, and not the share that rounds up to all.
    assert len(rows) == 2 * len(parts)
    scores = decision.scores["layers"]
    for row in rows:
        part = parts[row.layer]
        rest = tuple(t for t in row.treatments if isinstance(t, Quantize))
        assert row.covers == tuple(ref.path for ref in part.layers)
        feeding = sum(scores.damage(ref.path, rest) for ref in part.producers)
        assert row.damage == pytest.approx(scores.damage(row.layer, row.treatments) + feeding)
        full = next(o for o in decision.table.options if o.covers == (row.layer,) and not o.treatments)
        assert row.cost.flops == pytest.approx(sum(_plain(decision, r.path).flops for r in part.layers) / 2)
        assert full.damage == 0


def _plain(decision: Decision, path: str):  # type: ignore[no-untyped-def]
    return next(o.cost for o in decision.table.options if o.covers == (path,) and not o.treatments)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "vit"])
@pytest.mark.parametrize("budget", ["size=0.38x,flops=0.8x", "flops=0.8x", "params=0.8x"])
def test_the_plan_costs_what_it_predicts(name: str, budget: str) -> None:
    bench, decision = decided(name, budget)
    assert any(isinstance(t, Narrow) for own in decision.plan.layers.values() for t in own)
    smaller, report = apply_plan(bench.model, decision.plan, bench.calibration)
    assert parameter_bytes(smaller) == pytest.approx(decision.allocation.cost.bytes, abs=0.5)
    assert all(record.status == "done" for record in report)
    assert all(decision.allocation.cost.get(name) <= bound for name, bound in decision.limits.items())


def test_layers_without_a_part_are_not_narrowed() -> None:
    _, decision = decided("resnet", "size=0.5x")
    assert not any(isinstance(t, Narrow) for own in decision.plan.layers.values() for t in own)
