from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerwright.allocate.kv_budgets import kmeans_1d, kv_budgets
from layerwright.core.errors import InputError
from oracles.kv_policies import kmeans_best, kmeans_cost

VALUES = st.lists(st.integers(-1000, 1000).map(lambda i: i / 1000), min_size=1, max_size=9)


@given(VALUES, st.integers(1, 4))
def test_kmeans_is_the_best_cut(values: list[float], groups: int) -> None:
    labels = kmeans_1d(values, groups)
    assert len(set(labels)) == min(groups, len(set(values)))
    assert math.isclose(kmeans_cost(values, labels), kmeans_best(values, groups), abs_tol=1e-9)
    for one, a in zip(values, labels, strict=True):
        for other, b in zip(values, labels, strict=True):
            assert (a == b) if one == other else (a <= b) == (one < other) or a == b


@given(VALUES, st.integers(5, 60), st.floats(0.05, 1.0), st.integers(0, 40))
def test_the_total_is_exact_and_bounds_hold(values: list[float], mean: int, p: float, room: int) -> None:
    budgets = kv_budgets(values, mean, p, prompt_length=mean + room)
    assert sum(budgets) == mean * len(values)
    assert all(5 <= tokens <= mean + room for tokens in budgets)
    assert kv_budgets(values, mean, 1.0) == (mean,) * len(values)


@given(st.lists(st.integers(0, 10**6), min_size=2, max_size=9, unique=True), st.integers(10, 60), st.randoms())
def test_layers_may_come_in_any_order(values: list[int], mean: int, random: Any) -> None:
    order = list(range(len(values)))
    random.shuffle(order)
    budgets = kv_budgets([v / 1e6 for v in values], mean)
    assert kv_budgets([values[i] / 1e6 for i in order], mean) == tuple(budgets[i] for i in order)


def test_the_formula_of_the_paper() -> None:
    similarity = [0.5, 0.9, 0.91, 0.98, 0.985, 0.99, 0.982, 0.9]
    assert kmeans_1d(similarity, 3) == [0, 1, 1, 2, 2, 2, 2, 1]
    assert kv_budgets(similarity, 100, 0.35) == (165, 165, 165, 35, 35, 35, 35, 165)
    # 16: 5.6 and 26.4 are rounded down and the rest goes to the least similar of the others
    assert kv_budgets(similarity, 16, 0.35) == (27, 27, 27, 5, 5, 5, 5, 27)
    assert kv_budgets([0.9] * 4, 20) == (20,) * 4  # alike: uniform
    assert kv_budgets([0.1, 0.9], 20, 0.5) == (30, 10)
    assert kv_budgets(similarity, 100, 0.35, prompt_length=150) == (150, 150, 150, 50, 50, 50, 50, 150)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"p": 0.0}, "p: got"),
        ({"p": 1.2}, "p: got"),
        ({"groups": 1}, "groups"),
        ({"mean_budget": 4}, "mean_budget"),
        ({"mean_budget": 20.5}, "mean_budget"),
        ({"prompt_length": 19}, "mean_budget.*19"),
        ({"similarity": [0.1, math.nan]}, "similarity"),
        ({"similarity": []}, "similarity"),
    ],
)
def test_bad_settings(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        kv_budgets(**{"similarity": [0.1, 0.2], "mean_budget": 20, **settings})
    with pytest.raises(InputError, match="groups"):
        kmeans_1d([0.5], 0)
