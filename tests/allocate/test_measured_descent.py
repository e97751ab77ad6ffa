"""Greedy descent by measuring: lazy is full where damages rise, limits hold, histories fall."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from layerwright.allocate.measured_descent import Descent, greedy_descent
from layerwright.core.errors import BudgetError, InputError
from layerwright.nn.quantizer import fake_quantize, find_scale

LEVELS = (8, 6, 4, 3)


def sizes_cost(sizes: Mapping[str, int]) -> Callable[[Mapping[str, int]], dict[str, float]]:
    total = sum(sizes.values())
    return lambda choice: {"bits": sum(sizes[name] * bits for name, bits in choice.items()) / total}


def rising(weights: Mapping[str, float]) -> Callable[[Mapping[str, int]], float]:
    """Damage that grows with everything else that is lowered (supermodular)."""

    def metric(choice: Mapping[str, int]) -> float:
        each = [weights[name] * 2.0**-bits for name, bits in choice.items()]
        return sum(each) + sum(a * b for a, b in itertools.combinations(each, 2))

    return metric


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.01, 100), st.integers(1, 50)), min_size=1, max_size=6),
    st.floats(3, 8),
)
def test_lazy_takes_the_steps_of_the_full_form(rows: list[tuple[float, int]], target: float) -> None:
    weights = {f"v{i}": w for i, (w, _) in enumerate(rows)}
    sizes = {f"v{i}": n for i, (_, n) in enumerate(rows)}
    found: list[Descent[int]] = [
        greedy_descent(rising(weights), dict.fromkeys(weights, LEVELS), sizes_cost(sizes), {"bits": target}, lazy=lazy)
        for lazy in (True, False)
    ]
    lazy, full = found
    assert lazy.choice == full.choice
    assert [s.variable for s in lazy.history] == [s.variable for s in full.history]
    assert lazy.evaluations <= full.evaluations
    cost = sizes_cost(sizes)
    assert cost(lazy.choice)["bits"] <= target + 1e-9
    spent = [step.costs["bits"] for step in lazy.history]
    assert all(a > b for a, b in itertools.pairwise([8.0, *spent]))
    assert lazy.metric == pytest.approx(rising(weights)(lazy.choice))


def test_each_step_is_the_best_of_all() -> None:
    weights = {"a": 3.0, "b": 1.0, "c": 0.2}
    sizes = {"a": 4, "b": 1, "c": 3}
    metric, cost = rising(weights), sizes_cost(sizes)
    found = greedy_descent(metric, dict.fromkeys(weights, LEVELS), cost, {"bits": 4.0})
    choice = dict.fromkeys(weights, 8)
    for step in found.history:
        rated = {}
        for name, bits in choice.items():
            if bits != 3:
                then = {**choice, name: LEVELS[LEVELS.index(bits) + 1]}
                saving = (cost(choice)["bits"] - cost(then)["bits"]) / 4.0
                rated[name] = (max(metric(then) - metric(choice), 0) / saving, -saving)
        assert step.variable == min(rated, key=lambda name: rated[name])
        choice[step.variable] = step.after
    assert choice == found.choice


def test_falling_damage_counts_as_none_and_ties_take_the_larger_saving() -> None:
    found = greedy_descent(
        lambda choice: float(choice["small"] + choice["large"]),
        {"small": (8, 4), "large": (8, 4)},
        sizes_cost({"small": 1, "large": 9}),
        {"bits": 5.0},
    )
    assert [step.variable for step in found.history] == ["large"]
    assert found.history[0].score == 0 and found.history[0].damage == -4


def test_products_of_bits_and_several_limits() -> None:
    def costs(choice: Mapping[str, int]) -> dict[str, float]:
        return {"operations": choice["w"] * choice["a"], "bytes": choice["w"]}

    found = greedy_descent(
        lambda c: 2.0 ** -c["w"] + 2.0 ** -c["a"], {"w": LEVELS, "a": LEVELS}, costs, {"operations": 24, "bytes": 6}
    )
    assert costs(found.choice)["operations"] <= 24 and found.choice["w"] <= 6
    # Once the bytes hold, only operations count.
    loose = greedy_descent(
        lambda c: 100 * 2.0 ** -c["w"] + 2.0 ** -c["a"],
        {"w": LEVELS, "a": LEVELS},
        costs,
        {"operations": 48, "bytes": 8},
    )
    assert loose.choice == {"w": 8, "a": 6}


def test_lazy_measures_less() -> None:
    weights = {f"v{i}": float(1 + i * i) for i in range(12)}
    sizes = dict.fromkeys(weights, 1)
    options = dict.fromkeys(weights, LEVELS)
    lazy = greedy_descent(rising(weights), options, sizes_cost(sizes), {"bits": 4.0})
    full = greedy_descent(rising(weights), options, sizes_cost(sizes), {"bits": 4.0}, lazy=False)
    assert lazy.evaluations < 0.4 * full.evaluations
    assert lazy.evaluations <= 4 * 12 * 3


@torch.no_grad()
def test_lazy_equals_full_on_a_small_net() -> None:
    g = torch.Generator().manual_seed(0)
    layers = {f"layer{i}": torch.randn(12, 12, generator=g) * 0.3 * 1.6**i for i in range(4)}
    x = torch.randn(64, 12, generator=g)

    def run(choice: Mapping[str, int]) -> Tensor:
        y = x
        for name, weight in layers.items():
            scale, _ = find_scale(weight, choice[name])
            y = torch.tanh(y @ fake_quantize(weight, scale, None, choice[name]).T)
        return y

    wanted = run(dict.fromkeys(layers, 8))
    cost = sizes_cost(dict.fromkeys(layers, 1))

    def metric(choice: Mapping[str, int]) -> float:
        return float((run(choice) - wanted).square().mean())

    for target in (6.5, 5.0, 4.0, 3.25):
        lazy, full = (
            greedy_descent(metric, dict.fromkeys(layers, LEVELS), cost, {"bits": target}, lazy=lazy)
            for lazy in (True, False)
        )
        assert lazy.choice == full.choice and lazy.history == full.history


def test_bad_input() -> None:
    cost = sizes_cost({"a": 1})
    with pytest.raises(BudgetError, match=r"lowest level: bits 3 \(limit 2\)"):
        greedy_descent(lambda _: 0.0, {"a": LEVELS}, cost, {"bits": 2})
    with pytest.raises(InputError, match="a at 6 gave NaN"):
        greedy_descent(lambda c: 0.0 if c["a"] == 8 else math.nan, {"a": LEVELS}, cost, {"bits": 4})
    with pytest.raises(InputError, match="there are no variables"):
        greedy_descent(lambda _: 0.0, {}, cost, {"bits": 4})
    with pytest.raises(InputError, match="a has no level"):
        greedy_descent(lambda _: 0.0, {"a": ()}, cost, {"bits": 4})
    with pytest.raises(InputError, match="size is no resource"):
        greedy_descent(lambda _: 0.0, {"a": LEVELS}, cost, {"size": 4})
    for lazy in (True, False):
        with pytest.raises(InputError, match="from dear to cheap"):
            greedy_descent(lambda _: 0.0, {"a": (4, 8, 3)}, cost, {"bits": 3}, lazy=lazy)
