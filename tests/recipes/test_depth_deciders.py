"""Blocks removed one after the other, or by a pattern; budgets that cannot be met are refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from layerwright.core.blocks import find_blocks
from layerwright.core.calibration import Calibration
from layerwright.core.errors import BudgetError, InputError
from layerwright.core.recipe import Recipe
from layerwright.core.skip import skip_blocks
from layerwright.recipes.bench import Bench
from layerwright.recipes.book import recipe
from layerwright.recipes.job import Decision, decide
from layerwright.score.base import SCORERS, Subject
from layerwright.treat.apply import apply_plan
from layerwright.tune import TUNERS
from zoo import ZOO, logits


def decided(name: str, chosen: str, budget: str, **settings: Any) -> tuple[Bench, Decision]:
    model, batches = ZOO[name]()
    data = Calibration(batches)
    book: Recipe = recipe(chosen)
    book = replace(book, decider_settings={**book.decider_settings, **settings})
    bench = Bench(model, None, data, data, name)
    return bench, decide(bench, budget, book)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bart"])
def test_one_after_the_other(name: str) -> None:
    bench, decision = decided(name, "shortened-llama-iterative", "size=0.7x")
    removed = gone_from(decision)
    assert removed
    model = bench.model
    everything = [path for stack in find_blocks(model) for path in stack.names]
    gone: list[str] = []
    for path in removed:  # the order of the plan is the order of removal
        left = [p for p in everything if p not in gone and _left(model, {*gone, p})]
        with skip_blocks(model, gone):
            scores = SCORERS.get("block_perplexity")(Subject(model, bench.calibration, blocks=left)).sensitivities
        assert path == min(left, key=lambda p: scores[p])
        gone.append(path)
    shorter, _ = apply_plan(model, decision.plan, bench.calibration)
    with skip_blocks(model, removed):
        assert (
            logits(shorter, bench.calibration.batches[0]) - logits(model, bench.calibration.batches[0])
        ).abs().max() < 1e-5


def gone_from(decision: Decision) -> list[str]:
    return [path for path, treatments in decision.plan.layers.items() if treatments]


def _left(model: Any, gone: set[str]) -> bool:
    return all(any(path not in gone for path in stack.names) for stack in find_blocks(model))


def test_protected_ends() -> None:
    _, decision = decided("llama", "shortened-llama-iterative", "params=0.9x", protect_first=2, protect_last=0.25)
    assert gone_from(decision) == ["model.layers.2"]


@pytest.mark.parametrize("name", ["llama", "t5", "bart", "vit"])
def test_the_pattern(name: str) -> None:
    bench, decision = decided(name, "lora-layer-pruning", "size=1.0x", keep_first=1, stride=3)
    expected = {
        path
        for stack in find_blocks(bench.model)
        for index, path in enumerate(stack.names)
        if not (index < 1 or index == len(stack) - 1 or index % 3 == 0)
    }
    assert set(gone_from(decision)) == expected
    shorter, _ = apply_plan(bench.model, decision.plan, bench.calibration)
    settings = {**recipe("lora-layer-pruning").tuner_settings, "steps": 2}
    if name != "vit":
        tuned = TUNERS.get("lora")(shorter, bench.calibration, seed=0, **settings)
        assert [n for n, _ in tuned.named_parameters()] == [n for n, _ in shorter.named_parameters()]


@pytest.mark.parametrize(
    ("name", "chosen", "budget", "settings", "error", "message"),
    [
        (
            "llama",
            "shortened-llama-iterative",
            "size=0.05x",
            {},
            BudgetError,
            r"removing all 3 blocks that may go leaves",
        ),
        ("llama", "lora-layer-pruning", "size=0.3x", {"keep_first": 1}, BudgetError, r"the pattern, 1 blocks removed"),
        ("llama", "lora-layer-pruning", "size=0.9x", {}, InputError, "no stack is deep enough"),
        ("llama", "lora-layer-pruning", "size=0.9x", {"keep": 1}, InputError, "unknown 'keep'"),
        ("llama", "shortened-llama-iterative", "size=0.9x", {"protect_first": 4}, InputError, "none of this model's"),
    ],
)
def test_refused(
    name: str, chosen: str, budget: str, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        decided(name, chosen, budget, **settings)
