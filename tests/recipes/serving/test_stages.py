from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwright.core.errors import InputError
from layerwright.recipes.serving import POLICIES, StageTimer, default_policy
from layerwright.score.device import (
    Device,
    Energy,
    Stage,
    Work,
    bank_pim,
    device,
    draw_counts,
    duplex,
    h100,
    layer_costs,
    preset_shape,
    seconds,
)
from layerwright.score.device.costs import expert_work

MIXTRAL, GLAM = preset_shape("mixtral"), preset_shape("glam")
SHARED = [name for name in POLICIES if name != "hetero"]
STAGES = [Stage((700,) * 32), Stage((700,) * 31, (512,)), Stage((), (512, 100))]


def counts_for(shape, stage, seed=0):
    return draw_counts(shape, stage.tokens, np.random.default_rng(seed))


def time(shape, target: Device, n, policy, stage, seed=0, **settings):
    return StageTimer(shape, target, n, policy, **settings).time(stage, counts_for(shape, stage, seed))


def rooflines(shape, stage, counts, processor, shards=1):
    """Seconds of all layers one after the other, experts one by one."""
    costs = layer_costs(shape, stage, counts, shards=shards)
    plain = np.array([kind != "experts" for kind in costs.kinds])
    total = seconds(Work(costs.flops[plain], costs.bytes[plain]), processor).sum()
    return total + seconds(expert_work(shape, counts, shards=shards), processor).sum()


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.kind)
@pytest.mark.parametrize("shape", [MIXTRAL, GLAM, preset_shape("llama3-70b")], ids=lambda shape: shape.name)
def test_gpu_alone_is_the_sum_of_rooflines(shape, stage) -> None:
    counts = counts_for(shape, stage)
    for n, layout in ((1, "whole"), (4, "tensor")):
        found = StageTimer(shape, h100(), n, "gpu", communication=False, experts=layout).time(stage, counts)
        assert found.seconds == pytest.approx(rooflines(shape, stage, counts, h100().high, n))
        assert found.low_seconds == 0.0 and found.high_seconds == pytest.approx(found.seconds)


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.kind)
def test_without_a_low_processor_all_policies_are_alike(stage) -> None:
    alone = duplex().without_low()
    times = {policy: time(MIXTRAL, alone, 4, policy, stage, experts="whole").seconds for policy in SHARED}
    assert len({round(value, 15) for value in times.values()}) == 1
    assert times["gpu"] == time(MIXTRAL, h100(), 4, "gpu", stage).seconds


@pytest.mark.parametrize("shape", [MIXTRAL, GLAM], ids=lambda shape: shape.name)
def test_whole_experts_wait_for_the_slowest_device(shape) -> None:
    stage = STAGES[0]
    counts = counts_for(shape, stage)
    found = time(shape, h100(), 4, "gpu", stage, communication=False)
    table = np.asarray(seconds(expert_work(shape, counts), h100().high))
    by_device = np.stack([table[:, rank::4].sum(-1) for rank in range(4)])
    assert found.by_layer["experts"] == pytest.approx(by_device.max(0).sum())
    # split over all devices nobody waits, but every device reads the tokens of every expert
    split = time(shape, h100(), 4, "gpu", stage, communication=False, experts="tensor")
    assert split.by_layer["experts"] < found.by_layer["experts"] * (1.0 if shape is GLAM else 1.01)


def test_who_works_in_which_stage() -> None:
    decode, mixed, prefill = (time(MIXTRAL, duplex(), 4, "duplex", stage, communication=False) for stage in STAGES)
    assert decode.low_seconds == pytest.approx(decode.by_layer["attention"] + decode.by_layer["experts"])
    assert 0 < mixed.low_seconds < mixed.by_layer["attention"]
    assert prefill.low_seconds == 0.0
    # one processor at a time
    for found in (decode, mixed, prefill):
        assert found.high_seconds + found.low_seconds == pytest.approx(found.seconds)
    both = time(MIXTRAL, duplex(), 4, "duplex+pe", STAGES[1], communication=False)
    assert both.high_seconds + both.low_seconds > both.seconds
    assert both.by_layer["attention"] < mixed.by_layer["attention"]


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 100),
    st.lists(st.integers(1, 2000), max_size=3),
    st.integers(0, 99),
    st.sampled_from([MIXTRAL, GLAM]),
)
def test_working_together_never_hurts(decoding, prefill, seed, shape) -> None:
    stage = Stage((900,) * decoding, tuple(prefill))
    one, both, spaces = (
        time(shape, duplex(), 4, policy, stage, seed, by_space=by_space).seconds
        for policy, by_space in (("duplex", False), ("duplex+pe", False), ("duplex+pe", True))
    )
    assert both <= one * (1 + 1e-12)
    assert spaces <= one * (1 + 1e-12)


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(SHARED), st.floats(1.0, 4.0), st.sampled_from(STAGES), st.booleans())
def test_more_bandwidth_never_hurts(policy, factor, stage, low) -> None:
    before = duplex()
    assert before.low is not None
    side = "low" if low else "high"
    faster = dataclasses.replace(
        getattr(before, side), bandwidth=getattr(before, side).bandwidth * factor, op_per_byte=None
    )
    after = dataclasses.replace(before, **{side: faster})
    slower, quicker = (time(MIXTRAL, target, 4, policy, stage).seconds for target in (before, after))
    assert quicker <= slower * (1 + 1e-12)


def test_fastest_is_no_slower_than_one_processor_or_the_rule() -> None:
    for stage in STAGES:
        times = {p: time(MIXTRAL, duplex(), 4, p, stage).seconds for p in ("gpu", "duplex", "fastest")}
        assert times["fastest"] <= min(times.values()) * (1 + 1e-12)


def test_bank_pim_wins_where_every_head_has_its_own_keys() -> None:
    stage = STAGES[0]
    near, far = (time(preset_shape("opt-66b"), target, 4, "duplex", stage).seconds for target in (bank_pim(), duplex()))
    assert near < far
    near, far = (
        time(preset_shape("llama3-70b"), target, 4, "duplex", stage).seconds for target in (bank_pim(), duplex())
    )
    assert near > far


def test_hetero_runs_experts_on_half_of_the_devices() -> None:
    stage, counts = STAGES[0], counts_for(MIXTRAL, STAGES[0])
    target = device("hetero")
    found = StageTimer(MIXTRAL, target, 4, "hetero", communication=False).time(stage, counts)
    assert target.low is not None
    table = np.asarray(seconds(expert_work(MIXTRAL, counts), target.low))
    assert found.by_layer["experts"] == pytest.approx(np.stack([table[:, r::2].sum(-1) for r in (0, 1)]).max(0).sum())
    assert found.low_seconds == pytest.approx(found.by_layer["experts"])
    assert time(MIXTRAL, target, 4, "hetero", stage).by_layer["communication"] > 0


def test_communication() -> None:
    stage = STAGES[0]
    size = 32 * 4096 * 2
    found = time(MIXTRAL, duplex(), 4, "duplex", stage).by_layer["communication"]
    assert found == pytest.approx(2 * 32 * duplex().links.all_reduce_seconds(size, 4))
    assert time(MIXTRAL, duplex(), 1, "duplex", stage).by_layer["communication"] == 0.0
    two = time(MIXTRAL, duplex(), 8, "duplex", stage, nodes=2).by_layer["communication"]
    half = size / 2
    across = 2 * 32 * (0.5e-6 + half * 2 * 0.5 / 4 / 400e9)
    assert two == pytest.approx(2 * 32 * duplex().links.all_reduce_seconds(half, 4) + across)


@pytest.mark.parametrize(("n", "nodes"), [(1, 1), (2, 1), (3, 1), (16, 1), (16, 2), (6, 2)])
@pytest.mark.parametrize("policy", ["duplex", "duplex+pe+et"])
def test_every_expert_is_held_once(n, nodes, policy) -> None:
    timer = StageTimer(MIXTRAL, duplex(), n, policy, nodes=nodes)
    dealt = timer.dealt(np.arange(1, 9)[None])
    assert sorted(dealt[dealt > 0].tolist()) == list(range(1, 9))
    assert dealt.shape[1] == nodes
    assert timer.expert_shards == (n // nodes if policy == "duplex+pe+et" else max(n // nodes // (8 // nodes), 1))


def test_which_experts_run_low() -> None:
    stage = STAGES[0]
    counts = counts_for(GLAM, stage)
    timer = StageTimer(GLAM, duplex(), 8, "duplex+pe+et")
    low = timer.low_experts(counts, "decode")
    assert low.shape == counts.shape and 0 < low.sum() < low.size
    for row, tokens in zip(low, counts, strict=True):
        assert tokens[row].max(initial=0) <= tokens[~row].min(initial=10**6)
    assert StageTimer(GLAM, duplex(), 8, "duplex").low_experts(counts, "decode").all()
    assert not StageTimer(GLAM, duplex(), 8, "duplex").low_experts(counts, "mixed").any()


def test_energy_counts_every_operation_and_byte_once() -> None:
    stage, counts = STAGES[1], counts_for(MIXTRAL, STAGES[1])
    target = dataclasses.replace(duplex(), energy=Energy(1e-12, 30e-12, 20e-12))
    costs = layer_costs(MIXTRAL, stage, counts)
    found = StageTimer(MIXTRAL, target, 1, "gpu").time(stage, counts).joules
    assert found == pytest.approx(costs.flops.sum() * 1e-12 + costs.bytes.sum() * 30e-12)
    near = StageTimer(MIXTRAL, target, 1, "duplex+pe").time(stage, counts).joules
    assert near is not None and found is not None and near < found
    assert time(MIXTRAL, duplex(), 1, "gpu", stage).joules is None


@pytest.mark.parametrize(
    ("target", "n", "policy", "settings", "message"),
    [
        (duplex(), 4, "dupleks", {}, "unknown policy 'dupleks'.*did you mean duplex"),
        (duplex(), 4, "hetero", {}, "does not go with duplex, whose layout is shared"),
        (device("hetero"), 4, "duplex", {}, "does not go with hetero"),
        (device("hetero"), 3, "hetero", {}, "got 3 devices and 8 experts"),
        (duplex(), 5, "duplex", {"nodes": 2}, "got 5 in 2 nodes"),
        (duplex(), 0, "duplex", {}, "got 0 in 1 nodes"),
        (duplex(), 4, "duplex", {"experts": "hole"}, "unknown experts 'hole'; did you mean whole"),
    ],
)
def test_systems_that_cannot_be(target, n, policy, settings, message) -> None:
    with pytest.raises(InputError, match=message):
        StageTimer(MIXTRAL, target, n, policy, **settings)


def test_default_policies() -> None:
    found = [default_policy(item) for item in (h100(), duplex(), device("hetero"), device("duplex_split"))]
    assert found == ["gpu", "duplex+pe+et", "hetero", "duplex+pe+et"]
