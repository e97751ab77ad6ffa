"""Cache budgets from the similarity of attention, and in one program with everything else."""

from __future__ import annotations

import dataclasses
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import layerwright
from layerwright.allocate import integer
from layerwright.core.budget import Budget
from layerwright.core.calibration import Calibration, as_calibration
from layerwright.core.cost import Cost
from layerwright.core.errors import BudgetError, CheckError, InputError, PlanError
from layerwright.core.layers import treatable
from layerwright.core.option import Option, OptionTable
from layerwright.core.target import target
from layerwright.core.treatment import Drop, KVBudget, Quantize
from layerwright.nn.kv import cache_budgets, make_cache
from layerwright.nn.kv.attention import budgeted_attention
from layerwright.nn.kv.cache import held_bytes
from layerwright.recipes.bench import Bench
from layerwright.recipes.book import default_recipe, recipe
from layerwright.recipes.deciders import DECIDERS, Task
from layerwright.recipes.job import decide
from layerwright.recipes.kv_rows import cache_option, free_rows, measured_rows, uniform_budgets, with_rows
from layerwright.recipes.measure import measure
from layerwright.recipes.needs import has
from layerwright.recipes.optimize import optimize
from layerwright.recipes.squeeze import decide_squeeze, squeeze, squeeze_generate
from layerwright.score.attention_prompt import attention_prompt_similarity
from layerwright.score.costs import find_blocks_or_none, profile_model
from layerwright.treat.apply import apply_plan
from zoo import ZOO

LENGTH = 24
SHARES = recipe("joint").cache_shares


def data(batches: int = 5) -> Calibration:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 96, (4, LENGTH), generator=generator) for _ in range(batches)]
    return Calibration([{"input_ids": r, "labels": r} for r in rows], unit="nats/token")


def bench() -> Bench:
    model, _ = ZOO["llama"]()
    with torch.no_grad():  # random weights attend to nothing in particular: make it matter
        for block in model.model.layers:
            block.self_attn.q_proj.weight.mul_(20)
            block.self_attn.o_proj.weight.mul_(10)
    return Bench(model.eval(), None, data(), data(), "llama")


def task(budget: str = "kv=0.5x", to: str = "layerwright", **settings: Any) -> Task:
    own = bench()
    book = recipe("squeeze_attention")
    book = dataclasses.replace(book, decider_settings={**book.decider_settings, **settings})
    limits = Budget.parse(budget)
    profile = profile_model(own.model, own.calibration, timing=False)
    bounds = {limit.resource: limit.value * profile.total.get(limit.resource) for limit in limits}
    refs = tuple(treatable(own.model))
    return Task(own, book, limits, bounds, refs, find_blocks_or_none(own.model), profile, 4, target(to))


def test_the_default_for_a_cache_alone() -> None:
    assert default_recipe(Budget.parse("kv=0.4x")).name == "squeeze_attention"
    assert default_recipe(Budget.parse("kv=0.4x,size=0.5x")).name == "joint"
    assert default_recipe(Budget.parse("bits=4")).name == "mixed"
    assert DECIDERS.get("squeeze_attention") is decide_squeeze


def test_tokens_follow_the_similarity() -> None:
    job = task(p=0.35, sinks=1)
    choice = decide_squeeze(job)
    tokens = [own[0].tokens for own in choice.layers.values()]  # type: ignore[attr-defined]
    assert sum(tokens) == 4 * LENGTH // 2 and max(tokens) > min(tokens)
    similarity = list(choice.extra["similarity"].values())
    squeezed = max(range(4), key=similarity.__getitem__)
    assert tokens[squeezed] == min(tokens) == 4
    assert set(choice.layers) == {f"model.layers.{i}.self_attn" for i in range(4)}
    assert "group 3 of 3" in choice.reasons[f"model.layers.{squeezed}.self_attn"]
    several = decide_squeeze(task(p=[0.35, 0.7, 1.0], sinks=1))
    assert several.damage <= choice.damage + 1e-6


@pytest.mark.parametrize(
    ("budget", "settings", "words"),
    [
        ("kv=0.1x", {}, r"reachable minimum is kv=0\.209x"),
        ("size=0.5x", {}, "holds kv= alone"),
        ("kv=0.5x,size=0.5x", {}, "holds kv= alone"),
        ("kv=0.5x", {"to": "vllm"}, "cannot load cache budgets"),
        ("kv=0.5x", {"q": 1}, "unknown q"),
        ("kv=0.5x", {"p": 0.0}, "p: got"),
    ],
)
def test_what_it_refuses(budget: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises((BudgetError, InputError), match=words):
        decide_squeeze(task(budget, **settings))


def test_which_models_it_serves() -> None:
    served = {
        name: has("kv_cache", ZOO[name]()[0]) for name in ("llama", "gpt2", "opt", "qwen2", "gemma3", "bert", "t5")
    }
    assert served == {
        "llama": True, "gpt2": True, "opt": True, "qwen2": False, "gemma3": False, "bert": False, "t5": False
    }  # fmt: skip


@torch.no_grad()
def test_a_prompt_is_squeezed_by_itself() -> None:
    model = bench().model
    ids = next(iter(data()))["input_ids"]
    done = squeeze(model, ids, mean_budget=10, p=0.4, sinks=2, policy="window")
    torch.testing.assert_close(done.similarity, attention_prompt_similarity(model, ids), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(done.logits, model(input_ids=ids).logits[:, -1], rtol=1e-5, atol=1e-5)
    assert sum(done.budgets) == 40 and [layer.held for layer in done.cache.layers] == list(done.budgets)
    assert held_bytes(done.cache) == 4 * 40 * 2 * 2 * 8 * 4
    with budgeted_attention(model):
        model(input_ids=ids[:, :1], past_key_values=done.cache)
    assert held_bytes(done.cache) == 4 * 40 * 2 * 2 * 8 * 4 and done.cache.get_seq_length() == LENGTH + 1
    assert sum(squeeze(model, ids, fraction=0.5).budgets) == 48
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    plain: Tensor = model.generate(ids, attention_mask=mask, **settings)  # type: ignore[operator]
    for policy in ("window", "streaming", "h2o"):
        whole = squeeze_generate(model, ids, settings={"fraction": 1.0, "policy": policy}, **settings)
        assert torch.equal(whole[:, : LENGTH + 1], plain[:, : LENGTH + 1])
        small = squeeze_generate(model, ids, settings={"mean_budget": 8, "policy": policy}, **settings)
        assert small.shape == plain.shape
    for wrong in ({}, {"mean_budget": 8, "fraction": 0.5}, {"fraction": 0.0}, {"mean_budget": 8, "p": 2.0}):
        with pytest.raises(ValueError, match=r"mean_budget|fraction|p: got"):
            squeeze(model, ids, **wrong)  # type: ignore[arg-type]


def test_the_whole_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        import_module("layerwright.recipes.optimize"), "measure", partial(measure, seconds=0.01, batch_sizes=(1,))
    )
    own = bench()
    rows = [*own.calibration.batches, *own.heldout.batches]
    result = optimize(own.model, "kv=0.5x", data=Calibration(rows, unit="nats/token"), out=tmp_path / "out")
    before, after, uniform = (result.measured[name] for name in ("before", "after", "uniform"))
    assert result.decision.recipe.name == "squeeze_attention"
    assert after.kv_bytes_per_token == 0.5 * before.kv_bytes_per_token == uniform.kv_bytes_per_token
    assert after.bytes == before.bytes == uniform.bytes and after.loss != before.loss != uniform.loss
    assert "12 cache tokens in every layer" in result.data["uniform"]
    assert result.plan.predicted["kv_bytes_per_token"] == after.kv_bytes_per_token
    attention = [row for row in result.data["layers"] if row["kind"] == "attention"]
    assert all(row["bytes_after"] == row["bytes_before"] for row in attention)
    loaded, _ = layerwright.load(tmp_path / "out")
    assert cache_budgets(loaded) == cache_budgets(result.model) != {}
    assert cache_budgets(own.model) == {}
    ids = next(iter(data()))["input_ids"]
    with torch.no_grad():
        logits = loaded(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(logits, result.model(input_ids=ids, use_cache=False).logits)
        cache = DynamicCache(config=loaded.config)
        loaded(input_ids=ids, past_key_values=cache)
    assert held_bytes(cache) == 4 * LENGTH * after.kv_bytes_per_token
    assert sum(b for b in make_cache(loaded).budgets if b is not None) == 48


def test_one_program_for_bytes_and_cache() -> None:
    own = bench()
    decision = decide(own, "size=0.5x,kv=0.5x", _small_recipe())
    cost = decision.allocation.cost
    whole = decision.table.original
    assert cost.kv_bytes_per_token <= 0.5 * whole.kv_bytes_per_token and cost.bytes <= 0.5 * whole.bytes
    kinds = {type(t) for own in decision.plan.layers.values() for t in own}
    assert {KVBudget, Quantize} <= kinds
    assert decision.scores["cache"].damages and decision.allocation.optimal
    treated, report = apply_plan(own.model, decision.plan, own.calibration)
    assert cache_budgets(treated) and any("kv" in record.treatment for record in report)
    ids = next(iter(own.calibration))["input_ids"]
    with torch.no_grad():
        held = held_bytes(treated(input_ids=ids, use_cache=True).past_key_values) / ids.numel()
    assert abs(held - cost.kv_bytes_per_token) < 1e-6
    free = decide(own, "size=0.5x", _small_recipe())
    assert not any(isinstance(t, KVBudget) for own in free.plan.layers.values() for t in own)
    words = uniform_budgets(decision.plan.layers, decision.profile, decision.limits, own.calibration)
    assert all(own[0].tokens == 12 for own in words[0].values()) and len(words[0]) == 4  # type: ignore[attr-defined]
    assert uniform_budgets(free.plan.layers, free.profile, free.limits, own.calibration) == ({}, "")
    with pytest.raises(BudgetError, match=r"kv=0\.05x cannot be reached"):
        decide(own, "size=0.5x,kv=0.05x", _small_recipe())


def _small_recipe() -> Any:
    book = recipe("rtn")
    few = ((Quantize(8, -1, method="rtn"),), (Quantize(4, -1, method="rtn"),))
    return dataclasses.replace(book, candidates=few, allocator="integer", score_samples=8, cache_shares=SHARES)


def test_damages_are_measured_losses() -> None:
    own = bench()
    profile = profile_model(own.model, own.calibration, timing=False)
    limits = Budget.parse("kv=0.5x")
    rows = free_rows(own.model, own.calibration, profile, limits, target("layerwright"), SHARES)
    assert len(rows) == 4 * 6 and {r.damage for r in rows} == {0.0}
    few = [row for row in rows if row.layer == "model.layers.0.self_attn"][:3]
    found, scores = measured_rows(own, few, 4)
    assert found[0].damage == 0 and found[0].treatments == () and len(scores.damages) == 2
    part = own.calibration.head(4)
    treated, _ = apply_plan(own.model, {found[1].layer: found[1].treatments})
    assert found[1].damage == pytest.approx(part.mean_loss(treated) - part.mean_loss(own.model), abs=1e-6)
    assert found[1].damage != 0
    assert (
        free_rows(own.model, own.calibration, profile, Budget.parse("size=0.5x"), target("layerwright"), SHARES) == ()
    )
    assert free_rows(own.model, own.calibration, profile, limits, target("gguf"), SHARES) == ()
    sliding = ZOO["gemma3"]()[0]
    assert free_rows(sliding, own.calibration, profile, limits, target("layerwright"), SHARES) == ()
    assert free_rows(own.model, own.calibration, profile, limits, target("layerwright"), ()) == ()


def test_a_dropped_block_takes_its_cache_with_it() -> None:
    rows = (
        Option("b.0.attn", (), Cost(), 0.0),
        cache_option("b.0.attn", KVBudget(8), 100.0, 16, 0.5),
    )
    drop = Option("b.0", (Drop(),), Cost(kv_bytes_per_token=-100.0), 1.0, ("b.0.up",))
    keep = Option("b.0.up", (), Cost(bytes=10.0), 0.0)
    table = with_rows(OptionTable((keep, drop), Cost(kv_bytes_per_token=100.0), Cost(10, 10, 0, 100.0)), rows)
    assert rows[1].cost.kv_bytes_per_token == -50
    assert integer(table, {"kv_bytes_per_token": 60.0}).damage == 0.5
    gone = integer(table, {"kv_bytes_per_token": 10.0})
    assert gone.damage == 1.0 and gone.cost.kv_bytes_per_token == 0 and len(gone.chosen) == 1


def test_plans_with_budgets_for_other_layers_are_refused() -> None:
    own = bench()
    with pytest.raises(InputError, match="attention"):
        apply_plan(own.model, {"model.layers.0.mlp.up_proj": (KVBudget(8),)})
    with pytest.raises((PlanError, CheckError, InputError)):
        layerwright.apply(own.model, {"model.layers.9.self_attn": (KVBudget(8),)}, as_calibration(data()))
    model, batches = ZOO["qwen2"]()
    path = next(name for name, _ in model.named_modules() if name.endswith("self_attn"))
    with pytest.raises(InputError, match="DynamicSlidingWindowLayer"):
        apply_plan(model, {path: (KVBudget(8),)})
    assert batches
