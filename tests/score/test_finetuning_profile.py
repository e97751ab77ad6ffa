from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import nn

from layerwright.core.errors import InputError
from layerwright.core.readout import new_readout
from layerwright.score.finetuning_profile import FinetuningProfile, finetuning_profile, profile_windows
from layerwright.tune._loop import Schedule
from layerwright.tune.subtune import train_subset_
from subtuning_models import images, resnet

BLOCKS = [f"blocks.{n}" for n in range(4)]


def train(model: nn.Module, chosen: tuple[str, ...], fold: int, seed: int) -> None:
    """In place: the readout is exchanged, weights and statistics change, flags and modes are left changed."""
    model.head = new_readout(model.head, 3, seed)
    batches = [batch for number, batch in enumerate(images()) if number != fold]
    loss = lambda network, batch: nn.functional.cross_entropy(network(batch[0]), batch[1])  # noqa: E731
    train_subset_(model, chosen, "head", batches, loss, Schedule(6, 2e-2, seed=seed))
    model.train()
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def judge(model: nn.Module, fold: int) -> float:
    x, y = images()[fold]
    with torch.no_grad():
        return float((model.eval()(x).argmax(1) == y).float().mean()) + float(model(x).abs().mean()) * 1e-3


def test_does_not_depend_on_the_order_nor_on_earlier_evaluations() -> None:
    model = resnet()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    head, training = model.head, model.training
    one = finetuning_profile(model, BLOCKS, train, judge, folds=2, seeds=(0, 1))
    other = finetuning_profile(model, BLOCKS[::-1], train, judge, folds=2, seeds=(0, 1))
    assert dict(zip(one.names, one.accuracy, strict=True)) == dict(zip(other.names, other.accuracy, strict=True))
    alone = finetuning_profile(model, BLOCKS[2:3], train, judge, folds=2, seeds=(0, 1))
    assert alone.accuracy[0] == one.accuracy[2] and alone.std[0] == one.std[2] > 0
    assert len(set(one.accuracy)) == 4
    assert model.head is head and model.training == training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_the_model_is_put_back_after_an_exception() -> None:
    model = resnet()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def failing(network: nn.Module, fold: int) -> float:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        finetuning_profile(model, BLOCKS, train, failing, folds=2)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_windows_folds_and_seeds_are_all_run() -> None:
    seen: list[Any] = []

    def note(model: nn.Module, chosen: tuple[str, ...], fold: int, seed: int) -> nn.Module:
        seen.append((chosen, fold, seed))
        return nn.Linear(fold + 1, 1)

    told: list[str] = []
    profile = finetuning_profile(
        resnet(),
        BLOCKS,
        note,
        lambda trained, fold: trained.in_features / 10,
        window=2,
        folds=3,
        seeds=(4, 5),
        progress=lambda name, done, total: told.append(f"{name} {done}/{total}"),
    )
    assert profile.names == (("blocks.0", "blocks.1"), ("blocks.1", "blocks.2"), ("blocks.2", "blocks.3"))
    assert len(seen) == len(set(seen)) == 3 * 3 * 2
    assert profile.accuracy == pytest.approx((0.2, 0.2, 0.2))
    assert profile.std == pytest.approx([math.sqrt(2 / 3) / 10] * 3)
    assert told[-1] == "blocks.2 + blocks.3: 20.0% 3/3"


def test_best_and_plain_data() -> None:
    profile = FinetuningProfile.from_runs({("a",): (0.5, 0.7), ("b",): (0.8, 0.6), ("c",): (0.7,)})
    assert profile.best() == ("b",) and len(profile) == 3
    assert profile.std == pytest.approx((0.1, 0.1, 0.0))
    assert json.loads(json.dumps(profile.to_data()))[0]["blocks"] == ["a"]
    assert str(profile).splitlines()[1].startswith("b   70.0% ± 10.0%  ####")
    assert profile_windows(["a", "b", "c"], 3) == (("a", "b", "c"),)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"blocks": ["blocks.9"]}, "blocks"),
        ({"blocks": ["blocks.0", "blocks.0.norm"]}, "overlap"),
        ({"folds": 1}, "folds: got 1"),
        ({"window": 0}, "window: got 0"),
        ({"window": 5}, "window: got 5"),
        ({"seeds": ()}, "seeds"),
        ({"eval_fn": lambda _model, _fold: math.nan}, "NaN for blocks.0"),
    ],
)
def test_wrong_input_is_refused(settings: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"blocks": BLOCKS, "train_fn": lambda *_: None, "eval_fn": lambda *_: 0.5} | settings
    with pytest.raises(InputError, match=message):
        finetuning_profile(resnet(), **given)
