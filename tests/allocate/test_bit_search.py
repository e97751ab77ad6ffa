from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwright.allocate import ALLOCATORS
from layerwright.allocate.bit_search import _chances, bit_search, search_bits
from layerwright.core.errors import BudgetError, InputError
from oracles.allocate import best, layered_table, least
from oracles.proxies import best_vector

SEEDS = st.integers(0, 10**6)


def problem(seed: int, layers: int = 5, choices: int = 3) -> tuple[np.ndarray, np.ndarray, float]:
    """Gains that are linear in bits, costs and a limit between the ends."""
    random = np.random.default_rng(seed)
    numel = random.integers(1, 9, layers).astype(float)
    widths = np.arange(2, 2 + choices, dtype=float)
    gains, costs = np.outer(random.random(layers) * numel, widths), np.outer(numel, widths)
    return gains, costs, float(costs[:, 0].sum() + random.random() * (costs[:, -1] - costs[:, 0]).sum())


def score(gains: np.ndarray):
    return lambda vectors: gains[np.arange(len(gains)), vectors].sum(axis=1)


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.integers(2, 4))
def test_mutation_reaches_the_best_vector_of_small_spaces(seed: int, choices: int) -> None:
    gains, costs, limit = problem(seed, 5, choices)
    found = search_bits(score(gains), costs, limit, seed=seed)
    places = np.arange(5)
    assert costs[places, found].sum() <= limit * (1 + 1e-12)
    assert gains[places, found].sum() == pytest.approx(best_vector(gains.tolist(), costs.tolist(), limit))


def test_the_seed_decides_and_more_samples_are_not_worse() -> None:
    gains, costs, limit = problem(1, 40)
    runs = [search_bits(score(gains), costs, limit, samples=n, seed=3) for n in (250, 250, 5000)]
    np.testing.assert_array_equal(runs[0], runs[1])
    values = [gains[np.arange(40), run].sum() for run in runs]
    assert values[2] >= values[0]


def test_a_score_that_is_no_sum_can_be_searched() -> None:
    """Every layer alike and exactly the middle: only vectors of ones score."""

    def middle(vectors: np.ndarray) -> np.ndarray:
        return -(np.abs(vectors - 1).sum(axis=1).astype(float) ** 2)

    found = search_bits(middle, np.outer(np.ones(6), [1, 2, 3]), 17.0, seed=0)
    np.testing.assert_array_equal(found, np.ones(6))


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.integers(1, 6), st.integers(1, 3), st.floats(0.2, 0.9))
def test_milp_is_the_best_of_all_and_mutation_not_better(seed: int, layers: int, options: int, share: float) -> None:
    table = layered_table(seed, layers, options, per_block=0)
    low = least(table, "bytes")
    limits = {"bytes": low + share * (table.original.bytes - low + 1)}
    exact, mutated = (bit_search(table, limits, seed=seed, method=m, samples=2000) for m in ("milp", "mutate"))
    assert exact.damage == pytest.approx(best(table, limits), rel=1e-6, abs=1e-9)
    assert exact.method == mutated.method == "bit_search" and exact.optimal and not mutated.optimal
    assert mutated.cost.bytes <= limits["bytes"] * (1 + 1e-9)
    assert mutated.damage >= exact.damage - 1e-9
    assert {p for o in mutated.chosen for p in o.covers} == set(table.layers)


def test_two_limits_hold_together() -> None:
    table = layered_table(4, 6, 3, per_block=0)
    free = bit_search(table, {})
    # What the exact program takes under one limit shows that both can hold; each of them binds.
    reference = ALLOCATORS.get("integer")(table, {"bytes": 0.7 * free.cost.bytes})
    limits = {"bytes": reference.cost.bytes * 1.05, "ms": reference.cost.ms * 1.05}
    assert limits["bytes"] < free.cost.bytes
    found = bit_search(table, limits)
    assert found.cost.bytes <= limits["bytes"] and found.cost.ms <= limits["ms"]


def test_published_odds_and_layers_with_fewer_choices() -> None:
    there = np.array([[True] * 3, [True, True, False], [True, False, False]])
    chances = _chances(there, None)
    np.testing.assert_allclose(chances[0], [0.1, 0.4, 1.0])
    np.testing.assert_allclose(chances[1], [1 / 3, 1.0, 1.0])
    np.testing.assert_allclose(chances[2], [1.0, 1.0, 1.0])
    np.testing.assert_allclose(_chances(there, (1, 1, 2))[0], [0.25, 0.5, 1.0])
    costs = np.array([[1.0, 2.0, 3.0], [1.0, 2.0, np.inf], [1.0, np.inf, np.inf]])
    found = search_bits(lambda v: v.sum(axis=1).astype(float), costs, 100.0)
    np.testing.assert_array_equal(found, [2, 1, 0])


def test_bad_input_is_refused() -> None:
    gains, costs, limit = problem(0)
    with pytest.raises(BudgetError, match="below what can be reached: the cheapest vector costs"):
        search_bits(score(gains), costs, 0.5 * costs[:, 0].sum())
    with pytest.raises(InputError, match="samples=0"):
        search_bits(score(gains), costs, limit, samples=0)
    with pytest.raises(InputError, match="odds"):
        search_bits(score(gains), costs, limit, odds=(0.5, 0.5))
    with pytest.raises(InputError, match="not a number"):
        search_bits(lambda v: np.full(len(v), np.nan), costs, limit)
    table = layered_table(0, 4, 2, per_block=0)
    with pytest.raises(InputError, match="method"):
        bit_search(table, {}, method="guess")  # type: ignore[arg-type]
    with pytest.raises(BudgetError, match="reachable minimum"):
        ALLOCATORS.get("bit_search")(table, {"bytes": 1e-6})


@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_mutation_drops_no_block(seed: int) -> None:
    table = layered_table(seed, 6, 3, per_block=3)
    found = bit_search(table, {}, samples=500, seed=seed)
    assert all(len(option.covers) == 1 for option in found.chosen)
    assert [p for option in found.chosen for p in option.covers] == list(table.layers)
    alone = replace(table, options=tuple(o for o in table.options if len(o.covers) == 1))
    assert found.damage == pytest.approx(bit_search(alone, {}, samples=500, seed=seed).damage)
