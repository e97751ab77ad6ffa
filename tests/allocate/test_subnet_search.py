"""The search against every sub-network written out, under several budgets."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from layerwright.allocate.subnet_search import search_subnets
from layerwright.core.errors import BudgetError
from layerwright.nn.subnet import SubnetConfig, SubnetSpace

SPACE = SubnetSpace(4, (2, 3, 4), (1, 2, 4))
GAIN = {0: 3.0, 1: 1.0, 2: 0.2, 3: 2.0}


def cost(config: SubnetConfig) -> float:
    return 10 + sum(config.widths)


def loss(config: SubnetConfig) -> float:
    """Blocks are worth unlike amounts, with falling returns, and two of them work together."""
    gain = sum(GAIN[block] * width**0.5 for block, width in zip(config.keep, config.widths, strict=True))
    return 1 / (1 + gain + (1.5 if {1, 2} <= set(config.keep) else 0))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_finds_the_best_of_each_size(seed: int) -> None:
    budgets = [22.0, 13.0, 17.0, 12.0]
    found = search_subnets(SPACE, loss, cost, budgets, population=40, parents=12, generations=25, seed=seed)
    assert [one.budget for one in found] == budgets
    for one in found:
        best = min(loss(config) for config in SPACE if cost(config) <= one.budget)
        assert one.cost == cost(one.config) <= one.budget
        assert one.loss == loss(one.config)
        assert one.loss == pytest.approx(best, rel=0.02)
        SPACE.check(one.config)
    by_budget = sorted(found, key=lambda one: one.budget)
    assert all(small.loss >= large.loss for small, large in itertools.pairwise(by_budget))


def test_each_subnetwork_is_measured_once_and_seeds_repeat() -> None:
    seen: list[SubnetConfig] = []

    def watched(config: SubnetConfig) -> float:
        seen.append(config)
        return loss(config)

    first = search_subnets(SPACE, watched, cost, [13.0, 20.0], population=8, parents=3, generations=3, seed=5)
    assert len(seen) == len(set(seen)) < len(SPACE) / 2
    assert first == search_subnets(SPACE, loss, cost, [13.0, 20.0], population=8, parents=3, generations=3, seed=5)


def test_a_start_is_never_lost() -> None:
    best = min((config for config in SPACE if cost(config) <= 15), key=loss)
    (found,) = search_subnets(SPACE, loss, cost, [15.0], population=4, parents=2, generations=1, start=[best])
    assert found.config == best


@pytest.mark.parametrize("depths", [(2,), (4,), (1, 4)])
def test_depths_are_kept_to(depths: tuple[int, ...]) -> None:
    space = SubnetSpace(4, depths, (1, 2))
    for one in search_subnets(space, loss, cost, [14.0, 16.0], population=12, parents=4, generations=4):
        assert one.config.depth in depths


def test_bad_input() -> None:
    def run(**options: Any) -> Any:
        given: dict[str, Any] = {"space": SPACE, "loss_fn": loss, "cost_fn": cost, "budgets": [20.0]}
        return search_subnets(**(given | options))

    with pytest.raises(BudgetError, match="below the smallest"):
        run(budgets=[11.0])
    for budgets in ([], [0.0], [float("nan")]):
        with pytest.raises(ValueError, match="budgets"):
            run(budgets=budgets)
    for value in (float("nan"), -1.0):
        with pytest.raises(ValueError, match="loss_fn"):
            run(loss_fn=lambda _config, value=value: value)
    with pytest.raises(ValueError, match="widths"):
        run(start=[SubnetConfig((0, 1), (3, 3))])
    with pytest.raises(ValueError, match="parents"):
        run(population=2, parents=3)
