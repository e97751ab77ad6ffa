from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from layerwright.core.blocks import find_blocks
from layerwright.core.calibration import as_calibration
from layerwright.core.option import Scores
from layerwright.recipes.bench import Bench
from layerwright.recipes.book import recipe
from layerwright.recipes.job import decide, protected_blocks, removal_damages
from layerwright.recipes.optimize import optimize
from layerwright.score.base import Subject
from layerwright.studies._fixtures import byte_windows, decode_ratio
from layerwright.studies.shortened_llama import CRITERIA, pair_losses, removed_by
from layerwright.treat.drop import drop_blocks
from zoo import ZOO

RECIPES = ("shortened-llama", "shortened-llama-taylor", "shortened-llama-magnitude")


class Letters:
    """Bytes as tokens."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [3 + byte % 90 for byte in text.encode()]}


def test_windows_are_drawn_by_their_seed_from_disjoint_parts() -> None:
    first = byte_windows("calibration", Letters(), 10, 12, seed=1, batch_size=4)
    assert [tuple(b["input_ids"].shape) for b in first] == [(4, 12), (4, 12), (2, 12)]
    assert first.fingerprint() == byte_windows("calibration", Letters(), 10, 12, seed=1, batch_size=4).fingerprint()
    others = [("calibration", 2), ("heldout", 1)]
    assert (
        len({first.fingerprint(), *(byte_windows(p, Letters(), 10, 12, seed=s).fingerprint() for p, s in others)}) == 3
    )


def test_losses_of_all_pairs_are_those_of_the_shorter_models() -> None:
    model, batches = ZOO["llama"]()
    data = as_calibration(batches)
    names = find_blocks(model)[0].names
    losses = pair_losses(model, names, data, lambda *_: None)
    assert list(losses) == list(itertools.combinations(range(4), 2))
    for pair in ((0, 1), (1, 3)):
        shorter, _ = drop_blocks(model, [names[i] for i in pair])
        assert losses[pair] == pytest.approx(data.mean_loss(shorter), rel=1e-5)


@pytest.mark.parametrize("criterion", CRITERIA, ids=lambda c: c.name)
def test_criteria_remove_the_lowest_of_what_is_not_protected(criterion: Any) -> None:
    model, batches = ZOO["llama"]()
    subject = Subject(model, as_calibration(batches), blocks=find_blocks(model)[0].names)
    scores = criterion.score(subject)
    removed = removed_by(criterion, scores, 1)
    values = list(scores.sensitivities.values())
    places = range(criterion.first, 4 - criterion.last)
    assert removed == (min(places, key=lambda i: values[i]),)


def test_decode_ratio_of_a_model_to_itself_is_about_one() -> None:
    model, batches = ZOO["llama"]()
    ratio, ratios = decode_ratio(model, model, batches[0]["input_ids"][:1], tokens=4, pairs=5)
    assert len(ratios) == 5
    assert 0.2 < ratio < 5
    assert ratio == sorted(ratios)[2]


def test_shares_are_the_published_counts_at_the_published_depths() -> None:
    for name in RECIPES[1:]:
        settings = recipe(name).allocator_settings
        counts = {depth: tuple(protected_blocks(settings, depth).values()) for depth in (4, 8, 32, 40)}
        assert counts == {4: (1, 1), 8: (1, 1), 32: (4, 2), 40: (4, 2)}
    assert protected_blocks(recipe("shortened-llama").allocator_settings, 32) == {"protect_first": 0, "protect_last": 0}
    assert protected_blocks({"protect_first": 4, "other": 0.5}, 8) == {"protect_first": 4, "other": 0.5}


def test_perplexities_become_losses_in_the_same_order() -> None:
    scores = Scores(
        "block_perplexity", sensitivities={"a": math.exp(3.0), "b": math.exp(2.5), "c": math.inf}, base_loss=2.0
    )
    assert removal_damages(scores).sensitivities == pytest.approx({"a": 1.0, "b": 0.5})
    other = dataclasses.replace(scores, scorer="block_magnitude")
    assert removal_damages(other).sensitivities == pytest.approx({"a": math.exp(3.0), "b": math.exp(2.5)})


@pytest.mark.parametrize("name", RECIPES)
def test_a_plan_drops_the_blocks_that_the_criterion_ranks_lowest(name: str) -> None:
    model, batches = ZOO["llama"]()
    data = as_calibration(batches)
    decision = decide(Bench(model, None, data, data, "tiny"), "size=0.8x", name)
    dropped = {path for path, treatments in decision.plan.layers.items() if treatments}
    values = decision.scores["blocks"].sensitivities
    free = list(values)[1:-1] if name != "shortened-llama" else list(values)
    assert dropped == set(sorted(free, key=lambda path: values[path])[: len(dropped)])
    assert 1 <= len(dropped) <= 2
    assert decision.allocation.cost.bytes <= 0.8 * decision.table.original.bytes


def test_the_whole_recipe(tmp_path: Path) -> None:
    model, batches = ZOO["llama"]()
    quick = dataclasses.replace(recipe("shortened-llama"), tuner_settings={"steps": 20, "learning_rate": 3e-3})
    result = optimize(model, "size=0.8x", quick, data=batches, out=tmp_path / "out", uniform=False)
    assert len(find_blocks(result.model)[0]) < 4
    assert result.measured["after"].bytes <= 0.8 * result.measured["before"].bytes
    from layerwright.data.loading import load

    again, _ = load(tmp_path / "out")
    with torch.no_grad():
        inputs = batches[0]["input_ids"]
        assert torch.equal(again(inputs).logits, result.model(inputs).logits)
        with_cache = again.generate(inputs[:1], max_new_tokens=5, do_sample=False)
        without = again.generate(inputs[:1], max_new_tokens=5, do_sample=False, use_cache=False)
    assert torch.equal(with_cache, without)


def test_one_shot_refuses_a_depth_that_is_all_protected() -> None:
    model, batches = ZOO["llama"]()
    data = as_calibration(batches)
    strict = dataclasses.replace(recipe("shortened-llama"), allocator_settings={"protect_first": 4, "protect_last": 2})
    with pytest.raises(ValueError, match="protect fewer"):
        decide(Bench(model, None, data, data, "tiny"), "size=0.8x", strict)
