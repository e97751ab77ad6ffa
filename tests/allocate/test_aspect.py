from __future__ import annotations

import pytest

from layerwright.allocate.aspect import AspectCost, depth_width_plan
from layerwright.core.errors import BudgetError, InputError


def cost(layers: int, parameters: int, latency_ms: float, heads: int = 12) -> AspectCost:
    return AspectCost(layers, heads // layers, parameters, parameters, 1e6, 1000, latency_ms, 0.1, 1.0, 20, 0.1, 0.2)


MEASURED = (cost(1, 100, 1.0), cost(2, 140, 1.8), cost(3, 180, 2.4), cost(6, 300, 4.0))


@pytest.mark.parametrize(
    ("latency", "params", "layers"),
    [(10, None, 6), (2.4, None, 3), (None, 299, 3), (2.0, 1000, 2), (10, 139, 1), (1.0, 100, 1)],
)
def test_deepest_that_fits(latency: float | None, params: float | None, layers: int) -> None:
    assert depth_width_plan(12, MEASURED, budget_latency_ms=latency, budget_params=params).layers == layers


def test_best_that_fits() -> None:
    quality = {1: 0.80, 2: 0.79, 3: 0.80, 6: 0.9}
    assert depth_width_plan(12, MEASURED, budget_latency_ms=10, quality=quality).layers == 6
    assert depth_width_plan(12, MEASURED, budget_latency_ms=3, quality=quality).layers == 1
    assert depth_width_plan(12, MEASURED, budget_latency_ms=3, quality={2: 0.1, 3: 0.2}).layers == 3


def test_names() -> None:
    assert [c.name for c in MEASURED] == ["1x12", "2x6", "3x4", "6x2"]
    assert MEASURED[1].to_data()["heads_per_layer"] == 6


def test_what_cannot_be_planned() -> None:
    with pytest.raises(
        BudgetError, match="none of 1x12, 2x6, 3x4, 6x2 fits; the fastest takes 1 ms, the smallest has 100"
    ):
        depth_width_plan(12, MEASURED, budget_latency_ms=0.5)
    with pytest.raises(InputError, match="budget: got none"):
        depth_width_plan(12, MEASURED)
    with pytest.raises(InputError, match="budget_params: got 0"):
        depth_width_plan(12, MEASURED, budget_params=0)
    with pytest.raises(InputError, match="1x24 do not have total_heads=12"):
        depth_width_plan(12, [*MEASURED, cost(1, 10, 1.0, heads=24)], budget_params=100)
    with pytest.raises(InputError, match="measured: got no candidates"):
        depth_width_plan(12, [], budget_params=100)
    with pytest.raises(InputError, match="quality: got none"):
        depth_width_plan(12, MEASURED, budget_params=100, quality={12: 0.5})
