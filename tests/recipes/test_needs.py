"""Every recipe against every kind of model: what it cannot serve is refused at once, with the recipes that can."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from layerwright.core.calibration import Calibration
from layerwright.core.errors import InputError, LayerwrightError
from layerwright.recipes import job
from layerwright.recipes.bench import Bench
from layerwright.recipes.book import recipe, recipes
from layerwright.recipes.needs import NEEDS, has, require
from zoo import ZOO, on_meta

KINDS = {"decoder": "llama", "encoder": "bert", "cnn": "resnet", "vit": "vit", "t5": "t5", "bart": "bart"}
WORDS = ("decoder", "encoder", "vit", "t5", "bart")
SERVES: dict[str, tuple[str, ...]] = {
    "adaquant": tuple(KINDS),  # a model without batch norms is brought back to its own measured statistics
    "adaquant_light": tuple(KINDS),
    "edge_llm": ("decoder", "t5", "bart"),
    "emq": tuple(KINDS),
    "evol_q": tuple(KINDS),
    "fptq": WORDS,
    "joint": tuple(KINDS),
    "lora-layer-pruning": WORDS,
    "lrp_qvit": ("vit",),
    "mixed": tuple(KINDS),
    "mixed_td": ("cnn",),
    "mixllm": WORDS,
    "mptq_vit": WORDS,
    "rtn": tuple(KINDS),
    "shortened-llama": ("decoder", "t5", "bart"),
    "shortened-llama-cpt": ("decoder", "t5", "bart"),
    "shortened-llama-iterative": ("decoder", "t5", "bart"),
    "shortened-llama-magnitude": WORDS,
    "shortened-llama-similarity": WORDS,
    "shortened-llama-taylor": WORDS,
    "squeeze_attention": ("decoder",),
}
"""Recipe to the kinds of model that it serves."""
BUDGETS = {"mixed_td": "ms=0.8x", "joint": "size=0.5x", "edge_llm": "size=0.5x", "squeeze_attention": "kv=0.5x"}


@cache
def empty(kind: str) -> nn.Module:
    return on_meta(KINDS[kind])


@cache
def bench_of(kind: str) -> Bench:
    model, batches = ZOO[KINDS[kind]]()
    data = Calibration(batches)
    return Bench(model, None, data, data, kind)


def budget_of(name: str) -> str:
    return BUDGETS.get(name, "size=0.9x" if name.startswith(("shortened", "lora-layer")) else "bits=4.5")


class WorkError(Exception):
    """Work was about to begin."""


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise WorkError

    monkeypatch.setattr(job, "profile_model", refuse)


def test_every_recipe_is_listed_here() -> None:
    assert sorted(SERVES) == sorted(item.name for item in recipes())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SERVES)
def test_a_model_is_taken_or_refused_before_any_work(name: str, kind: str, no_work: None) -> None:
    torch.set_num_threads(1)
    bench = bench_of(kind)
    begun = time.process_time()
    if kind in SERVES[name]:
        with pytest.raises(WorkError):
            job.decide(bench, budget_of(name), name)
        return
    with pytest.raises(InputError, match=f"recipe {name} needs a model with") as caught:
        job.decide(bench, budget_of(name), name)
    assert time.process_time() - begun < 1.0
    offered = str(caught.value).partition("recipes for it: ")[2].split(", ")
    assert sorted(offered) == [other for other in sorted(SERVES) if other != name and kind in SERVES[other]]


@pytest.mark.parametrize("kind", KINDS)
def test_names_and_shapes_are_enough(kind: str) -> None:
    """The same verdicts without weights, so that `layerwright check` gives them."""
    for name, kinds in SERVES.items():
        assert all(has(need, empty(kind)) for need in recipe(name).needs) == (kind in kinds), name


def test_every_need_of_a_recipe_is_known() -> None:
    named = {need for item in recipes() for need in item.needs}
    assert named - set(NEEDS) == {"labels"}  # of the data: whoever reads the data refuses


def test_linear_layers_inside_and_outside_blocks() -> None:
    head = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    assert has("linear_layers", head) and not has("convolutions", head)
    assert not has("linear_blocks", nn.Linear(16, 16)) and has("linear_layers", nn.Linear(16, 16))
    with pytest.raises(InputError, match="fptq needs a model with linear layers, and Conv2d has none"):
        require("linear_layers", nn.Conv2d(8, 8, 3), "fptq")


def test_convolutions_that_cannot_be_factorised_do_not_count() -> None:
    def network(make: Callable[[], nn.Module]) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), make(), nn.ReLU(), make(), nn.Flatten(), nn.Linear(16, 4))

    assert has("convolutions", network(lambda: nn.Conv2d(16, 16, 3)))
    for other in (nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 3, groups=16), nn.Conv1d(16, 16, 3)):
        assert not has("convolutions", network(lambda other=other: other)), other  # type: ignore[misc]


@pytest.mark.parametrize("name", ["lrp-qvit", "lrp_qvit", "shortened_llama_taylor", "shortened-llama-taylor"])
def test_dashes_and_underscores_of_a_name_count_alike(name: str) -> None:
    found = recipe(name)
    assert found.name.replace("_", "-") == name.replace("_", "-")
    assert found is recipe(found.name)


def test_an_unknown_name_is_told_the_close_ones() -> None:
    with pytest.raises(LayerwrightError, match="lrp_qvit"):
        recipe("lrp-qvitt")
