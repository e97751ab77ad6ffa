"""The decider of edge_llm and its recipe."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch

from layerwright.allocate.luc import luc
from layerwright.core.budget import Budget
from layerwright.core.calibration import as_calibration
from layerwright.core.errors import BudgetError, InputError
from layerwright.core.layers import treatable
from layerwright.core.storage import stored_bytes
from layerwright.core.target import target
from layerwright.core.treatment import Quantize, RoundActivations, RoundCache, Sparsify
from layerwright.nn.rounded_cache import KeyValueRounding
from layerwright.recipes.bench import Bench
from layerwright.recipes.book import recipe
from layerwright.recipes.deciders import DECIDERS, Choice, Task
from layerwright.recipes.luc import caching_attention, decide_luc, luc_layers
from layerwright.score.compression_probes import compression_sensitivity
from layerwright.score.costs import find_blocks_or_none, profile_model
from layerwright.treat.apply import apply_plan
from layerwright.treat.probe import treat_weights
from zoo import ZOO


def task(budget: str = "size=0.6x", to: str = "layerwright", tuner: str = "", **settings: Any) -> Task:
    model, batches = ZOO["llama"]()
    data = as_calibration([{**b, "labels": b["input_ids"]} for b in batches])
    book = recipe("edge_llm")
    given = {**book.decider_settings, "prune": (0.3, 0.7), **settings}
    book = dataclasses.replace(book, decider_settings=given, tuner=tuner)
    bench = Bench(model.eval(), None, data, data, "llama")
    limits = Budget.parse(budget)
    profile = profile_model(model, data, name="llama")
    bounds = {
        limit.resource: limit.value * profile.total.get(limit.resource) if limit.unit == "relative" else limit.value
        for limit in limits
    }
    return Task(
        bench, book, limits, bounds, tuple(treatable(model)), find_blocks_or_none(model), profile, 4, target(to)
    )


def total_bytes(job: Task, choice: Choice) -> float:
    saved = sum(
        ref.numel * 4 - stored_bytes(choice.layers[ref.path], *ref.shape, ref.count, 4)
        for ref in job.refs
        if ref.path in choice.layers
    )
    return job.profile.total.bytes - saved


def parts(choice: Choice, path: str) -> dict[type, Any]:
    return {type(t): t for t in choice.layers.get(path, ())}


def test_the_papers_setting_is_carried_out_by_both_rules() -> None:
    job = task("size=0.9x", exact=True, sparsity=0.4)
    choice = DECIDERS.get("luc")(job)
    table = compression_sensitivity(
        job.bench.model, job.bench.calibration, treat_weights, probes={"prune": (0.3, 0.7), "bits": (4, 8)}
    )
    expected = luc(table.prune_sensitivity, table.bits_sensitivity, sparsity=0.4)
    assert {own.bits for own in expected.values()} == {4, 8}
    for ref in job.refs:
        own = expected[f"model.layers.{ref.block}"]
        found = parts(choice, ref.path)
        assert found[Quantize] == Quantize(own.bits, -1, method="rtn")
        assert found[RoundActivations].bits == own.bits and found[RoundActivations].share == "token"
        if own.sparsity:
            assert found[Sparsify].sparsity == own.sparsity and found[Sparsify].method == "sparsegpt"
        else:
            assert Sparsify not in found
    for block, own in expected.items():
        assert choice.layers[f"{block}.self_attn"] == (RoundCache(own.bits),)
    assert choice.extra["mean_sparsity"] == 0.4 and choice.extra["base_bits"] == 4
    assert "bits" in choice.reasons["model.layers.0.mlp.up_proj"]
    small, report = apply_plan(job.bench.model, choice.layers, job.bench.calibration)
    assert all(record.status == "done" for record in report.records)
    assert torch.isfinite(small(input_ids=next(iter(job.bench.calibration))["input_ids"]).logits).all()
    caches = {path: m.bits for path, m in small.named_modules() if isinstance(m, KeyValueRounding)}
    assert caches == {f"{path}.self_attn.key_value_rounding": own.bits for path, own in expected.items()}


def test_the_cache_can_be_left_alone() -> None:
    with_it, without = decide_luc(task()), decide_luc(task(cache=False))
    caches = {path for path, own in with_it.layers.items() if any(isinstance(t, RoundCache) for t in own)}
    assert len(caches) == 4 and without.layers == {p: t for p, t in with_it.layers.items() if p not in caches}
    decoder, encoder = ZOO["llama"]()[0], ZOO["vit"]()[0]
    assert set(caching_attention(decoder)) == caches and caching_attention(encoder) == []


def test_relative_errors_are_taken_where_asked() -> None:
    job = task("size=0.9x", exact=True, sparsity=0.4, relative=True)
    choice = decide_luc(job)
    table = compression_sensitivity(
        job.bench.model,
        job.bench.calibration,
        treat_weights,
        probes={"prune": (0.3, 0.7), "bits": (4, 8)},
        relative=True,
    )
    expected = luc(table.prune_sensitivity, table.bits_sensitivity, sparsity=0.4)
    assert {path: own.sparsity for path, own in expected.items()} == {
        path: block["sparsity"] for path, block in choice.extra["blocks"].items()
    }


def test_a_smaller_budget_moves_the_targets_as_little_as_it_needs() -> None:
    whole = decide_luc(task("size=1x", exact=True, sparsity=0.0))
    start = task("size=1x")
    fixed = start.profile.total.bytes - sum(ref.numel * 4 for ref in start.refs)
    at_base = total_bytes(start, whole) - fixed
    found = []
    for share in (1.0, 0.9, 0.75, 0.6, 0.5):
        job = task("size=1x")
        job = dataclasses.replace(job, limits={"bytes": fixed + share * at_base})
        choice = decide_luc(job)
        assert total_bytes(job, choice) <= job.limits["bytes"]
        found.append((choice.extra["base_bits"], choice.extra["mean_sparsity"]))
    bases = [base for base, _ in found]
    assert found[0] == (4, 0.0) and bases == sorted(bases, reverse=True) and bases[-1] < 4
    # At one base, a smaller budget means more zeros.
    assert all(a[1] < b[1] for a, b in itertools.pairwise(found) if a[0] == b[0])
    assert found[1][1] > 0 or found[1][0] < 4


def test_adapters_that_the_tuner_leaves_are_counted() -> None:
    job = task("size=0.8x", tuner="window")
    job = dataclasses.replace(job, recipe=dataclasses.replace(job.recipe, tuner_settings={"rank": 2}))
    choice = decide_luc(job)
    adapters = sum(4 * 2 * sum(ref.shape) for ref in job.refs)
    assert total_bytes(job, choice) + adapters <= job.limits["bytes"]


def test_same_data_same_choice() -> None:
    assert decide_luc(task()).layers == decide_luc(task()).layers


def test_a_block_of_16_bits_without_zeros_is_left_alone() -> None:
    job = task("size=0.9x", base_bits=8, exact=True, sparsity=0.0)
    choice = decide_luc(job)
    own = choice.extra["blocks"]
    assert {block["bits"] for block in own.values()} == {8, 16}
    treated = {".".join(path.split(".")[:3]) for path in choice.layers}
    assert treated == {path for path, block in own.items() if block["bits"] == 8}


def test_what_cannot_be_is_refused() -> None:
    for budget, words in (("size=0.01x", "cannot be reached"), ("kv=0.5x", "not kv")):
        with pytest.raises(BudgetError, match=words):
            decide_luc(task(budget))
    for settings, words in (
        ({"base_bits": 5}, "base_bits"),
        ({"sparsity": 1.0}, "sparsity"),
        ({"width": 3}, "unknown width"),
        ({"exact": True, "sparsity": 0.9}, "largest mean"),
    ):
        with pytest.raises(InputError, match=words):
            decide_luc(task(**settings))
    with pytest.raises(InputError, match="layerwright only"):
        decide_luc(task(to="vllm"))
    empty = dataclasses.replace(task(), refs=())
    with pytest.raises(InputError, match="no linear layers"):
        decide_luc(empty)


def test_layers_of_other_blocks_get_nothing() -> None:
    job = task()
    layers = luc_layers(luc({"model.layers.1": 1.0}, {"model.layers.1": 1.0}, sparsity=0.3), job.refs)
    assert layers and all(path.startswith("model.layers.1.") for path in layers)
