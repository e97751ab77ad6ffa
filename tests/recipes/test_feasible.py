"""A budget out of reach is refused from costs alone: before anything is scored."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch

from layerwright.core.calibration import Calibration
from layerwright.core.errors import BudgetError, InputError
from layerwright.core.recipe import Recipe
from layerwright.core.treatment import treatments_from_data
from layerwright.recipes import job
from layerwright.recipes.bench import Bench
from layerwright.recipes.job import decide
from layerwright.score.base import SCORERS
from zoo import ZOO

BITS = tuple(treatments_from_data(t) for t in ({"quantize": {"bits": 4, "method": "rtn"}}, {"low_rank": {"inner": 4}}))
PLAIN = Recipe("plain", candidates=BITS, scorer="weight_error", allocator="integer")
DROPPING = dataclasses.replace(PLAIN, name="dropping", drop_blocks=True, drop_scorer="similarity")
REMOVING = Recipe(
    "removing",
    allocator="one_shot",
    allocator_settings={"protect_first": 1, "protect_last": 1},
    drop_blocks=True,
    drop_scorer="similarity",
)


@pytest.fixture
def bench() -> Bench:
    torch.set_num_threads(1)
    model, batches = ZOO["llama"]()
    data = Calibration(batches)
    return Bench(model, None, data, data, "llama")


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the scorers that were asked for."""
    names: list[str] = []
    get = SCORERS.get

    def counted(name: str) -> Any:
        names.append(name)
        return get(name)

    monkeypatch.setattr(SCORERS, "get", counted)
    return names


@pytest.mark.parametrize(
    ("recipe", "budget"),
    [
        (PLAIN, "bits=1"),
        (PLAIN, "size=0.01x"),
        (PLAIN, "params=0.01x"),
        (PLAIN, "flops=0.01x"),
        (PLAIN, "kv=0.5x"),
        (PLAIN, "ms=0.001x"),
        (DROPPING, "size=0.001x"),
        (DROPPING, "flops=0.001x"),
        (REMOVING, "size=0.001x"),
    ],
    ids=str,
)
def test_a_limit_out_of_reach_is_refused_before_scoring(
    recipe: Recipe, budget: str, bench: Bench, scored: list[str]
) -> None:
    name = budget.partition("=")[0]
    with pytest.raises(BudgetError, match=rf"{budget} cannot be reached with recipe .* minimum is {name}=[\d.]+") as no:
        decide(bench, budget, recipe)
    assert not scored
    # What it names can be reached, and nothing much below it.
    least = float(re.findall(r"minimum is \w+=([\d.]+)", str(no.value))[0])
    unit = "" if name == "bits" else "x"
    if name == "ms" or recipe is REMOVING:
        return  # times differ from run to run, and protected blocks stay
    assert decide(bench, f"{name}={least}{unit}", recipe).allocation.chosen
    with pytest.raises(BudgetError):
        decide(bench, f"{name}={least - 0.02:.4f}{unit}", recipe)


def test_limits_that_do_not_hold_together_are_refused_before_scoring(bench: Bench, scored: list[str]) -> None:
    # Four bits are the smallest in bytes, but only the thin product saves parameters, and it is dense.
    alone = {name: decide(bench, budget, PLAIN) for name, budget in (("bits", "bits=4"), ("params", "params=0.65x"))}
    assert all(decision.allocation.chosen for decision in alone.values())
    scored.clear()
    sizes = {name: decision.allocation.cost.bytes for name, decision in alone.items()}
    assert sizes["bits"] < sizes["params"]
    with pytest.raises(BudgetError, match="cannot be held together"):
        decide(bench, "bits=4,params=0.65x", PLAIN)
    assert not scored


def test_protected_blocks_count(bench: Bench, scored: list[str]) -> None:
    whole = decide(bench, "size=0.99x", REMOVING).table.original.bytes
    scored.clear()
    with pytest.raises(BudgetError, match="removing all 2 unprotected blocks of 4"):
        decide(bench, "size=0.3x", REMOVING)
    assert not scored
    assert decide(bench, "size=0.65x", REMOVING).allocation.cost.bytes <= 0.65 * whole


def test_a_resource_that_the_model_has_none_of_is_named_before_scoring(scored: list[str]) -> None:
    model, batches = ZOO["vit"]()
    data = Calibration(batches)
    with pytest.raises(InputError, match="its kv is 0"):
        decide(Bench(model, None, data, data, "vit"), "kv=0.5x", PLAIN)
    assert not scored


def test_times_are_measured_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    real = job.measured_times

    def counted(*args: Any, **kwargs: Any) -> Any:
        made.append(args)
        return real(*args, **kwargs)

    monkeypatch.setattr(job, "measured_times", counted)
    assert decide(bench, "ms=50x", PLAIN).allocation.chosen
    assert len(made) == 1
