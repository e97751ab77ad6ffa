"""The deciders of mixllm and fptq, and their recipes."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from layerwright.core.budget import Budget
from layerwright.core.calibration import as_calibration
from layerwright.core.errors import BudgetError, InputError
from layerwright.core.layers import structure_copy, treatable
from layerwright.core.plan import Plan
from layerwright.core.storage import stored_bytes
from layerwright.core.target import target
from layerwright.core.treatment import MixRows, Quantize, RoundActivations
from layerwright.data.loading import load
from layerwright.nn.w4a8 import W4A8Linear, integer_layers_
from layerwright.recipes.bench import Bench
from layerwright.recipes.book import recipe
from layerwright.recipes.deciders import DECIDERS, Choice, Task
from layerwright.recipes.fptq import decide_fptq, fptq_layers, fptq_plan
from layerwright.recipes.mixllm import decide_mixllm, nominal_bits, rows_for_bits
from layerwright.score.costs import find_blocks_or_none, profile_model
from layerwright.treat.apply import apply_plan
from layerwright.treat.export import FORMATS
from layerwright.treat.prepare import prepare_
from zoo import ZOO, logits


def task(
    name: str = "llama", budget: str = "bits=4.4", chosen: str = "mixllm", to: str = "layerwright", **settings: Any
) -> Task:
    model, batches = ZOO[name]()
    data = as_calibration([{**b, "labels": b["input_ids"]} for b in batches])
    book = recipe(chosen)
    book = dataclasses.replace(book, decider_settings={**book.decider_settings, "group_size": 8, **settings})
    if book.prepare:
        model = structure_copy(model)
        prepare_(model, book.prepare, data)
    bench = Bench(model.eval(), None, data, data, name)
    limits = Budget.parse(budget)
    profile = profile_model(model, data, name=name)
    bounds = {}
    for limit in limits:
        relative = limit.value * profile.total.get(limit.resource)
        bounds[limit.resource] = relative if limit.unit == "relative" else limit.value
    refs = tuple(treatable(model))
    return Task(bench, book, limits, bounds, refs, find_blocks_or_none(model), profile, 4, target(to))


def layers_bytes(job: Task, choice: Choice) -> float:
    after = sum(stored_bytes(choice.layers[r.path], *r.shape, r.count, 4) for r in job.refs if r.path in choice.layers)
    return job.profile.total.bytes - sum(r.numel for r in job.refs if r.path in choice.layers) * 4 + after


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_budget_is_the_average_of_the_weights(name: str) -> None:
    job = task(name)
    choice = DECIDERS.get("mixllm")(job)
    refs = {ref.path: ref for ref in job.refs}
    bits = weights = high = 0.0
    for path, (mix,) in choice.layers.items():
        assert isinstance(mix, MixRows) and refs[path].block is not None
        out, in_ = refs[path].shape
        widths = mix.widths(out)
        bits += in_ * sum(width * len(rows) for width, rows in widths.items())
        weights += out * in_
        high += len(widths.get(8, ()))
    assert 4.4 - 4 * max(ref.shape[1] for ref in job.refs) / weights < bits / weights <= 4.4 and high > 0
    assert choice.extra["nominal_bits"] == pytest.approx(bits / weights)
    small, report = apply_plan(job.bench.model, choice.layers, job.bench.calibration)
    stored = sum(small.get_submodule(path).average_bits * refs[path].numel for path in choice.layers)  # type: ignore[operator]
    assert choice.extra["effective_bits"] == pytest.approx(stored / weights)
    assert set(choice.reasons) == set(choice.layers)
    again = DECIDERS.get("mixllm")(job)
    assert again.layers == choice.layers
    assert all(record.status == "done" for record in report.records)


def test_sizes_and_fractions_are_held() -> None:
    job = task(budget="size=0.4x")
    choice = decide_mixllm(job)
    assert layers_bytes(job, choice) <= job.limits["bytes"]
    more = dataclasses.replace(job, limits={"bytes": job.limits["bytes"] * 1.05})
    assert decide_mixllm(more).extra["nominal_bits"] > choice.extra["nominal_bits"] > 4
    fixed = decide_mixllm(task(budget="bits=8", fractions={8: 0.1, 5: 0.2, 4: 0.7}))
    widths = {width for (mix,) in fixed.layers.values() for width in mix.widths(10_000)}  # type: ignore[attr-defined]
    assert widths == {8, 5, 4}
    with pytest.raises(BudgetError, match="cannot be reached"):
        decide_mixllm(task(budget="size=0.05x"))
    with pytest.raises(BudgetError, match=r"above bits=4\.1"):
        decide_mixllm(task(budget="bits=4.1", fractions={8: 0.5, 4: 0.5}))
    with pytest.raises(BudgetError, match="the smallest reachable is 4"):
        decide_mixllm(task(budget="bits=3.5"))


def test_rows_of_less_are_part_of_those_of_more() -> None:
    generator = torch.Generator().manual_seed(0)
    losses = {"a": torch.rand(10, generator=generator), "b": torch.rand(20, generator=generator)}
    columns = {"a": 64, "b": 16}
    before: set[tuple[str, int]] = set()
    for bits in (4.0, 4.2, 4.9, 7.0, 8.0):
        plan = rows_for_bits(losses, columns, bits)
        rows = {(name, row) for name, own in plan.items() for row in own[8].tolist()}
        assert before <= rows and nominal_bits(plan, columns) <= bits + 1e-9
        before = rows
    assert len(before) == 30 and not any(len(own[8]) for own in rows_for_bits(losses, columns, 4.0).values())


def test_what_mixllm_refuses() -> None:
    with pytest.raises(InputError, match=r"group_size: 24 does not divide the inputs of model\.layers"):
        decide_mixllm(task(group_size=24))
    with pytest.raises(InputError, match="load in layerwright only"):
        decide_mixllm(task(to="vllm"))
    with pytest.raises(BudgetError, match="not ms="):
        decide_mixllm(task(budget="ms=0.5x"))
    with pytest.raises(InputError, match="unknown widths"):
        decide_mixllm(task(widths=4))
    with pytest.raises(InputError, match="got widths 8 and 4"):
        decide_mixllm(task(low=8, high=4))


def test_fptq_prepares_decides_and_applies(tmp_path: Path) -> None:
    job = task(chosen="fptq", budget="bits=5", v0=0.5, v1=100.0)
    choice = decide_fptq(job)
    strategies = choice.extra["strategies"]
    assert set(strategies.values()) <= {"static", "dynamic"}
    refs = {ref.path: ref for ref in job.refs}
    for path, (weight, act) in choice.layers.items():
        assert weight == Quantize(4, 8, method="rtn")
        share = "token" if strategies[path] == "dynamic" else "tensor"
        assert act == RoundActivations(8, share=share, symmetric=True, observer="minmax")
        assert path in refs and "largest input" in choice.reasons[path]
    small, _ = apply_plan(job.bench.model, choice.layers, job.bench.calibration)
    batch = next(iter(job.bench.calibration))
    with torch.no_grad():
        wanted, found = logits(job.bench.model, batch), logits(small, batch)
        assert integer_layers_(small) == list(choice.layers)
        exact = logits(small, batch)
    assert (found - wanted).norm() < 0.3 * wanted.norm()
    assert (exact - found).norm() < 2e-2 * wanted.norm()  # a value at the border of two codes may fall the other way
    assert isinstance(small.get_submodule(next(iter(choice.layers))), W4A8Linear)
    FORMATS.get("safetensors")(small, tmp_path / "out")
    again, _ = load(tmp_path / "out", dtype="float32")
    with torch.no_grad():
        assert torch.equal(logits(again.eval(), batch), exact)
    FORMATS.get("compressed-tensors")(small, tmp_path / "other")
    other = type(job.bench.model).from_pretrained(tmp_path / "other", dtype=torch.float32).eval()
    with torch.no_grad():
        assert (logits(other, batch) - found).norm() < 1e-4 * wanted.norm()


def test_fptq_as_a_plan_to_edit(tmp_path: Path) -> None:
    model, batches = ZOO["llama"]()
    data = as_calibration(batches)
    plan = fptq_plan(model.eval(), data, v0=0.5, v1=100.0, group_size=128)
    plan.save(tmp_path / "plan.yaml")
    read = Plan.load(tmp_path / "plan.yaml")
    assert read.layers == plan.layers and read.prepare == plan.prepare
    equalized = [path for path, why in plan.reasons.items() if why.startswith("lae")]
    assert plan.prepare == {"log_equalize": {"layers": " ".join(equalized)}} and equalized
    q = next(path for path in equalized if path.endswith("q_proj"))
    (weight, act) = plan.layers[q]
    assert isinstance(weight, Quantize) and isinstance(act, RoundActivations) and act.share == "tensor"
    width = next(ref.shape[1] for ref in treatable(model) if ref.path == q)
    assert weight.group_size == torch.gcd(torch.tensor(128), torch.tensor(width))
    small, _ = apply_plan(model, read, batches)
    with torch.no_grad():
        wanted, found = logits(model, batches[0]), logits(small, batches[0])
    assert (found - wanted).norm() < 0.3 * wanted.norm()


def test_experts_without_tokens_become_dynamic() -> None:
    model, _ = ZOO["llama"]()
    refs = [ref for ref in treatable(model) if ref.layout == "linear"][:2]
    from layerwright.allocate.activation_strategy import fptq_strategy

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        chosen = fptq_strategy({refs[0].path: 1.0}, layers=[ref.path for ref in refs])
    assert len(said) == 1
    layers = fptq_layers(chosen, refs, group_size=8)
    shares = [t.share for own in layers.values() for t in own if isinstance(t, RoundActivations)]
    assert shares == ["tensor", "token"]


def test_what_fptq_refuses() -> None:
    for budget, words in (
        ("bits=3", "every layer 4 bits"),
        ("size=0.05x", "cannot be reached"),
        ("ms=0.5x", "not ms="),
    ):
        with pytest.raises(BudgetError, match=words):
            decide_fptq(task(chosen="fptq", budget=budget))
    with pytest.raises(InputError, match="v0, v1: got 150 and 15"):
        decide_fptq(task(chosen="fptq", v0=150.0, v1=15.0))
    with pytest.raises(InputError, match="unknown kv_bits"):
        decide_fptq(task(chosen="fptq", kv_bits=8))
    with pytest.raises(InputError, match="cannot load"):
        decide_fptq(task(chosen="fptq", to="gguf"))


def test_both_recipes_are_in_the_library() -> None:
    for name in ("mixllm", "fptq"):
        book = recipe(name)
        assert book.decider == name and book.decider in DECIDERS
    assert recipe("fptq").prepare == {"log_equalize": {"v0": 15.0, "v1": 150.0}}
