from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwright.allocate.coprocess import op_per_byte_plan, runs_low, split_experts
from layerwright.core.errors import InputError
from layerwright.score.device import (
    Stage,
    draw_counts,
    duplex,
    expert_table,
    h100,
    layer_costs,
    preset_shape,
)
from oracles.placement import best_prefix, best_subset

counts_of = st.lists(st.integers(0, 200), min_size=1, max_size=8)
TABLES = [
    np.asarray(expert_table(preset_shape("mixtral"), processor, 20_000, shards=4))
    for processor in (duplex().high, duplex().low)
    if processor
]


@st.composite
def tables(draw):
    """Times that grow with the tokens, as any device's do."""
    start, step = draw(st.floats(0.1, 10)), draw(st.floats(0.0, 1.0))
    return np.concatenate([[0.0], start + step * np.arange(200)])


@settings(deadline=None)
@given(counts_of, tables(), tables())
def test_the_split_is_the_best_prefix(counts, high, low) -> None:
    found = split_experts(counts, high, low)
    assert float(found.time) == pytest.approx(best_prefix(counts, high, low))
    assert sorted(found.low_ids + found.high_ids) == list(range(len(counts)))
    assert float(found.low_seconds) == pytest.approx(sum(low[counts[e]] for e in found.low_ids))
    assert float(found.high_seconds) == pytest.approx(sum(high[counts[e]] for e in found.high_ids))
    if found.low_ids and found.high_ids:
        assert max(counts[e] for e in found.low_ids) <= min(counts[e] for e in found.high_ids)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.integers(1, 2000))
def test_the_gap_to_the_best_subset_of_256_is_small(seed, tokens) -> None:
    counts = draw_counts(preset_shape("mixtral"), tokens, np.random.default_rng(seed))[0].tolist()
    best = best_subset(counts, *TABLES)
    assert best * (1 - 1e-12) <= float(split_experts(counts, *TABLES).time) <= 1.15 * best


def test_all_layers_at_once_as_one_by_one() -> None:
    counts = np.random.default_rng(0).integers(0, 300, (3, 5, 16))
    found = split_experts(counts, *TABLES)
    assert found.low.shape == counts.shape and found.time.shape == (3, 5)
    for place in np.ndindex(3, 5):
        one = split_experts(counts[place], *TABLES)
        np.testing.assert_array_equal(one.low, found.low[place])
        assert one.time == found.time[place]
    with pytest.raises(InputError, match="this split has 3 axes"):
        _ = found.low_ids


@settings(deadline=None)
@given(counts_of, tables(), tables(), st.integers(1, 10))
def test_whole_spaces_are_never_better_than_free_experts(counts, high, low, spaces) -> None:
    # One space for each expert is the free split; fewer only take choices away from the best of all subsets.
    found = split_experts(counts, high, low, spaces=spaces)
    assert float(found.time) >= best_subset(counts, high, low) * (1 - 1e-9)
    for space in range(spaces):
        assert len(set(found.low[space::spaces].tolist())) <= 1
    if spaces >= len(counts):
        assert float(found.time) == pytest.approx(float(split_experts(counts, high, low).time))


def test_both_processors_are_never_slower_than_one() -> None:
    counts = np.random.default_rng(1).integers(0, 500, (20, 64))
    found = split_experts(counts, *TABLES)
    for table in TABLES:
        assert (found.time <= np.where(counts > 0, table[counts], 0).sum(-1) + 1e-15).all()


def test_no_tokens_no_time_and_equal_processors_share() -> None:
    assert float(split_experts([0, 0, 0], *TABLES).time) == 0.0
    ones = np.concatenate([[0.0], np.ones(10)])
    found = split_experts([3, 3, 3, 3], ones, ones)
    assert float(found.time) == 2.0 and len(found.low_ids) == 2
    assert float(split_experts([], ones, ones).time) == 0.0


@pytest.mark.parametrize(
    ("counts", "settings", "message"),
    [
        ([-1, 2], {}, "counts: got -1"),
        (3, {}, "a single number"),
        ([11], {}, "tabulated to 10 tokens, an expert has 11"),
        ([1], {"spaces": 0}, "spaces: got 0"),
    ],
)
def test_splits_that_cannot_be(counts, settings, message) -> None:
    table = np.arange(11.0)
    with pytest.raises(InputError, match=message):
        split_experts(counts, table, table, **settings)


def test_the_plan_follows_the_kind_of_layer() -> None:
    shape = preset_shape("glam")
    decode = op_per_byte_plan(layer_costs(shape, Stage((512,) * 32)), duplex())
    mixed = op_per_byte_plan(layer_costs(shape, Stage((512,) * 32, (512,))), duplex())
    assert {name.partition(".")[2].partition(".")[2] for name, side in decode.layers.items() if side == "low"} == {
        "attention.decode",
        "experts",
    }
    assert mixed.layers["layers.1.experts"] == "high" and mixed.layers["layers.1.attention.decode"] == "low"
    assert mixed.layers["layers.1.attention.prefill"] == "high"
    assert str(decode) == "duplex, decode: 97 layers high, 48 low"
    assert "below the crossover at 32" in decode.reasons["layers.1.experts"]
    data = decode.to_data()
    assert data["stage"] == "decode" and data["layers"]["head"]["processor"] == "high"


def test_the_fastest_plan_takes_the_smaller_time_of_each_layer() -> None:
    costs = layer_costs(preset_shape("mixtral"), Stage((2048,) * 16))
    fastest = op_per_byte_plan(costs, duplex(), rule="fastest")
    by_kind = op_per_byte_plan(costs, duplex())
    alone = op_per_byte_plan(costs, h100())
    assert fastest.total_seconds <= by_kind.total_seconds <= alone.total_seconds
    assert set(alone.layers.values()) == {"high"}
    for name, side in fastest.layers.items():
        assert (costs.op_per_byte[costs.names.index(name)] < 32) == (side == "low")


def test_rules() -> None:
    assert runs_low("experts", "mixed", "experts") and not runs_low("attention.decode", "decode", "experts")
    assert not runs_low("experts", "mixed") and not runs_low("qkv", "decode")
    with pytest.raises(InputError, match=r"unknown rule 'fast'.*did you mean fastest"):
        op_per_byte_plan(layer_costs(preset_shape("mixtral"), Stage((1,))), duplex(), rule="fast")  # type: ignore[arg-type]
