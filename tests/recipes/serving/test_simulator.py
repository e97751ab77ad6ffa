from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwright.core.errors import InputError
from layerwright.recipes.serving import POLICIES, Request, ServingSimulator, make_requests
from layerwright.score.device import Energy, LMShape, Processor, Stage, device, duplex, h100, preset_shape

TINY = LMShape("tiny", 4, 64, 128, 4, 2, num_experts=4, top_k=2, vocab_size=100)
MIXTRAL = preset_shape("mixtral")
LAYOUTS = {"shared": duplex(), "split": device("duplex_split"), "hetero": device("hetero")}


def simulator(target=None, batch=4, **settings) -> ServingSimulator:
    return ServingSimulator(TINY, target or duplex(), settings.pop("n_devices", 2), batch=batch, **settings)


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.tuples(st.floats(0, 0.01), st.integers(1, 30), st.integers(1, 12)), min_size=1, max_size=12),
    st.integers(1, 5),
    st.sampled_from(sorted(LAYOUTS)),
    st.booleans(),
)
def test_every_request_is_served_and_every_token_counted(rows, batch, layout, closed) -> None:
    requests = [Request(*row) for row in rows]
    found = simulator(LAYOUTS[layout], batch).run(requests, closed_loop=closed)
    assert (found.completed, found.unfinished, found.requests) == (len(requests), 0, len(requests))
    assert found.tokens == sum(r.new for r in requests)
    assert found.t2ft.count == found.e2e.count == len(requests)
    assert found.tbt.count == sum(r.new - 1 for r in requests)
    assert found.t2ft.percentile(0) > 0 and found.e2e.percentile(0) >= found.t2ft.percentile(0) * (1 - 1e-12)


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 40), st.integers(1, 6), st.booleans(), st.sampled_from(["shared", "split"]))
def test_a_closed_loop_conserves_requests(steps, batch, warm, layout) -> None:
    requests = make_requests(60, 20, 8, spread=0.3)
    found = simulator(LAYOUTS[layout], batch).run(requests, closed_loop=True, warm=warm, max_steps=steps)
    entered = found.completed + found.unfinished
    assert found.unfinished == min(batch, len(requests) - found.completed)
    assert entered <= len(requests)
    if layout == "shared":
        assert sum(found.stages.values()) == min(steps, sum(found.stages.values()))
        assert found.tokens <= batch * sum(found.stages.values())


def test_one_request_by_hand() -> None:
    model = simulator(h100(), n_devices=1, seed=3)
    found = model.run([Request(0.0, 10, 3)])
    generator = np.random.default_rng(3)
    times = [model.draw(stage, generator).seconds for stage in (Stage(prefill=(10,)), Stage((11,)), Stage((12,)))]
    assert found.seconds == pytest.approx(sum(times))
    assert found.t2ft.mean == pytest.approx(times[0]) and found.e2e.mean == pytest.approx(sum(times))
    assert found.tbt.mean == pytest.approx(sum(times[1:]) / 2)
    assert found.stages == {"decode": 2, "prefill": 1}
    assert sum(found.time_by_layer.values()) == pytest.approx(found.seconds)
    assert found.throughput == pytest.approx(3 / sum(times))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_first_token_takes_at_least_its_prefill(layout) -> None:
    model = simulator(LAYOUTS[layout])
    requests = make_requests(20, 200, 10, rate=1e4, spread=0.0)
    found = model.run(requests)
    alone = model.draw(Stage(prefill=(200,)), np.random.default_rng(0)).seconds
    # the choice of experts differs from draw to draw
    assert found.t2ft.percentile(0) >= alone * 0.8
    dense = dataclasses.replace(TINY, num_experts=0, top_k=0, moe_layers=(), expert_size=0)
    if layout != "hetero":
        exact = ServingSimulator(dense, LAYOUTS[layout], 2, batch=4)
        prefill = exact.draw(Stage(prefill=(200,)), np.random.default_rng(0)).seconds
        assert exact.run(requests).t2ft.percentile(0) >= prefill * (1 - 1e-9)


def test_policies_are_alike_without_a_low_processor() -> None:
    requests = make_requests(12, 50, 10)
    alone = duplex().without_low()
    found = [simulator(alone, policy=policy, n_devices=1).run(requests) for policy in POLICIES if policy != "hetero"]
    assert len({report.seconds for report in found}) == 1
    assert {report.low_seconds for report in found} == {0.0}


@pytest.mark.parametrize("side", ["high", "low"])
def test_throughput_rises_with_bandwidth(side) -> None:
    requests = make_requests(200, 100, 50)
    rates = []
    for factor in (1, 2, 4):
        part: Processor = getattr(duplex(), side)
        faster = dataclasses.replace(part, bandwidth=part.bandwidth * factor, op_per_byte=None)
        target = dataclasses.replace(duplex(), **{side: faster})
        run = ServingSimulator(MIXTRAL, target, policy="duplex", batch=16)
        rates.append(run.run(requests, closed_loop=True, warm=True, max_steps=40).throughput)
    assert rates[0] < rates[1] < rates[2] if side == "high" else rates[0] <= rates[1] <= rates[2]


def test_same_seed_same_report() -> None:
    requests = make_requests(30, 40, 10, rate=1000.0, spread=0.2)
    first, again, other = (simulator(seed=seed).run(requests) for seed in (0, 0, 1))
    assert first == again != other


def test_gains_are_those_of_the_published_comparison() -> None:
    requests = make_requests(100, 1024, 1024)
    rates = {
        name: ServingSimulator(MIXTRAL, target, policy=policy, batch=32)
        .run(requests, closed_loop=True, warm=True, max_steps=40)
        .throughput
        for name, target, policy in (
            ("gpu", h100(), "gpu"),
            ("duplex", duplex(), "duplex"),
            ("all", duplex(), "duplex+pe+et"),
        )
    }
    assert 1.9 < rates["duplex"] / rates["gpu"] < rates["all"] / rates["gpu"] < 3.2


def test_the_cache_limits_the_batch() -> None:
    shape = preset_shape("opt-66b")
    requests = make_requests(40, 4096, 4096, spread=0.0)
    model = ServingSimulator(shape, h100(), batch=32)
    fits = math.floor(model.budget / shape.kv_bytes(8192))
    found = model.run(requests, closed_loop=True, warm=True, max_steps=3)
    assert found.batch == fits < 32
    assert "does not fit" in found.warnings[0] and str(found).endswith(found.warnings[0])
    with pytest.raises(InputError, match=f"at most {fits} requests fit"):
        ServingSimulator(shape, h100(), batch=32, kv_overflow="raise").run(requests)
    with pytest.raises(InputError, match="one request take"):
        model.run([Request(0.0, 200_000, 1)])


def test_admission_waits_for_the_memory() -> None:
    small = dataclasses.replace(h100(), capacity_bytes=TINY.weight_bytes + 2.5 * TINY.kv_bytes(30))
    found = simulator(small, batch=8, n_devices=1).run([Request(0.0, 20, 10)] * 6)
    assert found.completed == 6 and found.batch == 2
    # three groups of two, one after the other
    assert found.stages["prefill"] == 3


def test_a_queue_that_diverges_is_warned_about() -> None:
    slow = make_requests(60, 20, 10, rate=1.0)
    fast = make_requests(200, 20, 10, rate=1e9)
    assert simulator().run(slow).warnings == ()
    assert simulator().run(make_requests(200, 20, 10)).warnings == ()  # all there from the start
    assert "queue grows without bound" in simulator().run(fast).warnings[0]


def test_split_prefills_beside_decoding() -> None:
    requests = make_requests(60, 2000, 40, spread=0.2)
    together, apart = (
        ServingSimulator(MIXTRAL, target, 8, batch=16).run(requests, closed_loop=True, warm=True)
        for target in (duplex(), device("duplex_split"))
    )
    assert "mixed" in together.stages and set(apart.stages) == {"decode", "prefill"}
    # a prefill never holds up the tokens of others
    assert apart.tbt.p90 < together.tbt.p90
    assert apart.completed == together.completed == 60


def test_warm_starts_leave_out_what_they_did_not_see() -> None:
    requests = make_requests(50, 100, 20)
    found = simulator(batch=8).run(requests, closed_loop=True, warm=True, max_steps=10)
    assert found.stages.get("decode", 0) + found.stages.get("mixed", 0) == 10
    assert found.e2e.count == 0 and found.completed > 0
    assert found.to_data()["e2e"] == {"count": 0, "mean": None, "percentiles": ()}


def test_energy_of_a_token() -> None:
    requests = make_requests(40, 100, 50)
    energy = Energy(0.5e-12, 32e-12, 20e-12)
    per_token = {}
    for name, target in (("gpu", h100()), ("duplex", duplex())):
        with_energy = dataclasses.replace(target, energy=energy)
        report = ServingSimulator(MIXTRAL, with_energy, batch=16).run(requests, closed_loop=True, max_steps=30)
        per_token[name] = report.joules_per_token
    assert per_token["duplex"] is not None and per_token["gpu"] is not None
    assert 0.5 < per_token["duplex"] / per_token["gpu"] < 0.9
    assert simulator().run(requests[:1]).joules_per_token is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch": 0}, "batch: got 0"),
        ({"skew": -1.0}, "skew: got -1"),
        ({"kv_overflow": "drop"}, "kv_overflow: got 'drop'"),
        ({"policy": "hetro"}, "unknown policy 'hetro'.*did you mean hetero"),
        ({"target": device("duplex_split"), "n_devices": 3}, "splits the devices of a node: got 3"),
    ],
)
def test_simulators_that_cannot_be(settings, message) -> None:
    with pytest.raises(InputError, match=message):
        simulator(settings.pop("target", None), **settings)


def test_runs_that_cannot_be() -> None:
    with pytest.raises(InputError, match="requests: got none"):
        simulator().run([])
    with pytest.raises(InputError, match="needs closed_loop"):
        simulator().run([Request(0.0, 1, 1)], warm=True)
    with pytest.raises(InputError, match="max_steps: got 0"):
        simulator().run([Request(0.0, 1, 1)], max_steps=0)
    with pytest.raises(InputError, match="do not fit into"):
        ServingSimulator(MIXTRAL, h100(), 1)
