"""Labels, capacities and learning rates of routed models, and the tuner."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import layerwright as lw
from layerwright.core.blocks import find_blocks
from layerwright.recipes.tune import tune_job
from layerwright.treat.route import DLOHandle, find_routing, route_tokens
from layerwright.tune import TUNERS
from layerwright.tune.dlo import DLOObjective, capacity_learning_rates, dlo, run_labels
from oracles.routing import least_similar
from zoo import ZOO


def routed(seed: int = 0, **options: Any) -> tuple[DLOHandle, list[Any]]:
    model, batches = ZOO["llama"]()
    handle = route_tokens(model, **options)
    generator = torch.Generator().manual_seed(seed)
    for routing in handle.routings:
        routing.router.weight.data = 0.3 * torch.randn(32, generator=generator)
    return handle, batches


@given(
    st.integers(1, 3).flatmap(
        lambda routers: st.tuples(
            st.permutations(list(range(routers * 6))), st.lists(st.booleans(), min_size=6, max_size=6).filter(any)
        )
    ),
    st.fractions(Fraction(1, 20), 1, max_denominator=20),
)
@settings(max_examples=80, deadline=None)
def test_labels_over_all_blocks(given_: tuple[list[int], list[bool]], share: Fraction) -> None:
    order, real = given_
    similarity = torch.tensor(order, dtype=torch.float32).reshape(-1, 2, 3) / 100
    mask = torch.tensor(real).reshape(2, 3)
    labels = run_labels(similarity, mask, float(share))
    expected = least_similar(similarity.reshape(-1, 6).tolist(), real, share)
    assert labels.reshape(-1, 6).tolist() == expected
    assert int(labels.sum()) == max(1, math.ceil(share * len(similarity) * sum(real)))
    assert torch.equal(run_labels(similarity.flip(0), mask, float(share)), labels.flip(0))
    alone = run_labels(similarity, mask, [float(share)] * len(similarity))
    for own, row in zip(alone.reshape(-1, 6).tolist(), similarity.reshape(-1, 6).tolist(), strict=True):
        assert [own] == least_similar([row], real, share)


@pytest.mark.parametrize("mode", ["cos-global", "cos", "self"])
@pytest.mark.parametrize("count_padding", [False, True])
def test_loss_is_the_mean_cross_entropy_and_capacities_follow_the_labels(mode: Any, count_padding: bool) -> None:
    handle, batches = routed()
    objective = DLOObjective(0.6, mode, coefficient=0.5, anneal_steps=0, count_padding=count_padding)
    objective.begin(handle)
    assert handle.capacity.tolist() == [0.6] * 4
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 7:] = 0
    with handle.learning(similarity=mode != "self"):
        handle.model(batches[0]["input_ids"], attention_mask=mask)
    loss = objective.loss(handle)
    assert handle.last is not None
    real = mask.bool()
    if mode == "self":
        labels = torch.stack([call.mask for call in handle.last])
    else:
        assert handle.last_similarity is not None
        labels = run_labels(handle.last_similarity, real, 0.6 if mode == "cos-global" else [0.6] * 4)
    total, count = 0.0, 0
    for call, own in zip(handle.last, labels, strict=True):
        for b, t in torch.cartesian_prod(torch.arange(2), torch.arange(12)).tolist():
            if bool(real[b, t]) or count_padding:
                score = float(call.scores[b, t].detach())
                total -= math.log(score if bool(own[b, t]) else 1 - score)
                count += 1
    assert not labels[:, ~real].any()
    assert float(loss.detach()) == pytest.approx(0.5 * total / count, rel=1e-5)
    loss.backward()
    assert all(routing.router.weight.grad is not None for routing in handle.routings)
    others = [p for n, p in handle.model.named_parameters() if "token_routing" not in n and p.grad is not None]
    assert others  # the router reads hidden states, through which its loss goes on
    objective.step()
    found = handle.capacity
    assert float(found.mean()) == pytest.approx(0.6)
    if mode == "cos-global":
        shares = labels.sum((1, 2)).double() / real.sum()
        assert torch.allclose(found, shares * 0.6 / shares.mean())
        assert len({round(value, 6) for value in found.tolist()}) > 1
    else:
        assert found.tolist() == pytest.approx([0.6] * 4)


@pytest.mark.parametrize("mode", ["cos-global", "cos"])
def test_annealing(mode: Any) -> None:
    handle, batches = routed()
    objective = DLOObjective(0.9, mode)
    assert [objective.mean_capacity(step) for step in (0, 500, 1000, 2000)] == pytest.approx([1, 0.95, 0.9, 0.9])
    objective.begin(handle)
    assert handle.capacity.tolist() == [1.0] * 4
    for step in range(1, 1002):
        if step in (500, 1000):
            with handle.learning(), torch.no_grad():
                handle.model(batches[0]["input_ids"])
                objective.loss(handle)
        objective.step()
        if step in (500, 1000):
            assert float(handle.capacity.mean()) == pytest.approx({500: 0.95, 1000: 0.9}[step])
    assert float(handle.capacity.mean()) == pytest.approx(0.9)


def test_the_loss_needs_a_call_of_learning() -> None:
    handle, batches = routed()
    objective = DLOObjective()
    with pytest.raises(RuntimeError, match="no recorded similarities"):
        objective.loss(handle)
    handle.model(batches[0]["input_ids"])
    with pytest.raises(RuntimeError, match="no recorded similarities"):
        objective.loss(handle)
    with handle.learning(similarity=False):
        handle.model(batches[0]["input_ids"])
    with pytest.raises(RuntimeError, match="no recorded similarities"):
        objective.loss(handle)
    assert torch.isfinite(DLOObjective(mode="self").loss(handle))
    handle.model.train()
    handle.model(batches[0]["input_ids"])
    assert torch.isfinite(objective.loss(handle))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_capacity": 0.0}, "target_capacity"),
        ({"target_capacity": 1.1}, "target_capacity"),
        ({"target_capacity": float("nan")}, "target_capacity"),
        ({"mode": "cosine"}, "mode"),
        ({"coefficient": -1.0}, "coefficient"),
        ({"anneal_steps": -1}, "anneal_steps"),
    ],
)
def test_bad_objectives(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DLOObjective(**options)


def test_unknown_modes_and_beginnings_list_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"cos-global"):
        DLOObjective(mode="cos_global")  # type: ignore[arg-type]
    model, batches = ZOO["llama"]()
    with pytest.raises(ValueError, match=r"identity"):
        dlo(model, batches, steps=1, init="identical")  # type: ignore[arg-type]


@pytest.mark.parametrize("chained", [False, True])
def test_learning_rates_have_the_scheduled_mean_and_do_not_compound(chained: bool) -> None:
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(4)]
    groups: list[dict[str, Any]] = [{"params": [parameters[3]]}]
    groups += [{"params": [parameter], "block": number} for number, parameter in enumerate(parameters[:3])]
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    plain = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    kind: Any = torch.optim.lr_scheduler.ExponentialLR if chained else torch.optim.lr_scheduler.LambdaLR
    setting: Any = 0.5 if chained else (lambda step: 0.5**step)
    schedulers = [kind(optimizer, setting), kind(plain, setting)]
    for step in range(4):
        capacity = torch.tensor([0.2, 0.9, 1.0]) if step % 2 else torch.tensor([1.0, 0.3, 0.8])
        rates = capacity_learning_rates(optimizer, capacity)
        rate = plain.param_groups[0]["lr"]
        assert sum(rates) / 3 == pytest.approx(rate)
        expected = [rate * (c + 1 - float(capacity.mean())) for c in capacity.tolist()]
        assert rates == pytest.approx(expected)
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([rate, *expected])
        optimizer.step()
        plain.step()
        for scheduler in schedulers:
            scheduler.step()


def test_learning_rates_that_cannot_be_set() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match="every group"):
        capacity_learning_rates(torch.optim.SGD([{"params": [parameter], "block": 0}], lr=1.0), [1.0])
    other = torch.nn.Parameter(torch.zeros(1))
    groups = [{"params": [other]}, {"params": [parameter], "block": 1}]
    with pytest.raises(ValueError, match="block 1"):
        capacity_learning_rates(torch.optim.SGD(groups, lr=1.0), [1.0])


def batches_of(name: str = "llama") -> tuple[Any, list[Any]]:
    return ZOO[name]()


def test_the_tuner_deepens_routes_and_learns() -> None:
    model, batches = batches_of()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tuned: Any = dlo(model, batches, steps=60, learning_rate=3e-3, target_capacity=0.6)
    assert len(find_blocks(tuned)[0]) == 5
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    handle = find_routing(tuned)
    assert handle is not None
    assert handle.last is None
    data = lw.Calibration(batches)
    assert data.mean_loss(tuned) < data.mean_loss(model) - 0.1
    assert 0.4 < handle.executed_fraction() < 0.8
    assert float(handle.capacity.mean()) == pytest.approx(0.6, abs=0.02)
    again: Any = dlo(model, batches, steps=60, learning_rate=3e-3, target_capacity=0.6)
    assert all(torch.equal(a, b) for a, b in zip(tuned.parameters(), again.parameters(), strict=True))
    assert all(parameter.requires_grad for parameter in tuned.parameters())


def test_a_routed_model_is_trained_on() -> None:
    model, batches = batches_of()
    routed_once = route_tokens(model, [0, 2]).model
    tuned = dlo(routed_once, batches, steps=4, learning_rate=1e-3, target_capacity=0.5, mode="self")
    handle = find_routing(tuned)
    assert handle is not None
    assert handle.blocks == ("model.layers.0", "model.layers.2")
    assert len(find_blocks(tuned)[0]) == 4
    weights = [routing.router.weight for routing in handle.routings]
    assert all(bool(weight.abs().max() > 0) for weight in weights)


@pytest.mark.parametrize("options", [{"num_new": 3}, {"num_new": -1}])
def test_number_of_new_blocks(options: Any) -> None:
    model, batches = batches_of()
    with pytest.raises(ValueError, match="num_new"):
        dlo(model, batches, steps=1, **options)


def test_blocks_that_run_more_learn_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    rates: list[list[float]] = []

    def watch(optimizer: Any, capacity: Tensor) -> list[float]:
        seen.append(capacity)
        rates.append(capacity_learning_rates(optimizer, capacity))
        return rates[-1]

    monkeypatch.setattr("layerwright.tune.dlo.capacity_learning_rates", watch)
    model, batches = batches_of()
    dlo(model, batches, steps=6, learning_rate=1e-3, target_capacity=0.5, anneal_steps=2, warmup=0.0)
    assert [float(capacity.mean()) for capacity in seen] == pytest.approx([1, 0.75, 0.5, 0.5, 0.5, 0.5])
    assert rates[0] == pytest.approx([1e-3] * 5)
    assert len({round(rate, 9) for rate in rates[3]}) > 1


def test_routers_may_learn_faster() -> None:
    model, batches = batches_of()
    found = []
    for rate in (1.0, 20.0):
        handle = find_routing(dlo(model, batches, steps=3, learning_rate=1e-4, warmup=0.0, router_rate=rate))
        assert handle is not None
        found.append(max(float(routing.router.weight.detach().abs().max()) for routing in handle.routings))
    assert found[1] == pytest.approx(20 * found[0], rel=0.3)
    with pytest.raises(ValueError, match="router_rate"):
        dlo(model, batches, steps=1, router_rate=0.0)


def test_variant_block_is_tuned_too() -> None:
    model, batches = batches_of()
    tuned = dlo(model, batches, steps=20, learning_rate=3e-3, variant="block", target_capacity=0.7)
    data = lw.Calibration(batches)
    assert data.mean_loss(tuned) < data.mean_loss(model)


def test_by_name_and_back_from_disk(tmp_path: Path) -> None:
    assert "dlo" in TUNERS.names()
    measured = tune_job("demo:lm", "dlo", tmp_path / "out", steps=2, samples=4, length=32, seconds=0.01)
    assert set(measured) == {"before", "after"}
    tuned: Any = lw.load(tmp_path / "out")[0]
    handle = find_routing(tuned)
    assert handle is not None
    assert len(handle.blocks) == 10
    assert 0 < handle.capacity.mean() <= 1
    ids = torch.arange(40, 52)[None]
    with_cache = tuned.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(with_cache, tuned.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False))
