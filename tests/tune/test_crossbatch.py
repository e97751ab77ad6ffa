"""Batches of document windows, the schedule of contexts, and training."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
import torch

from layerwright.core.errors import InputError
from layerwright.treat.memory import add_memory
from layerwright.tune.crossbatch import CrossBatchLoader, crossbatch, focus_schedule, next_token_loss
from zoo import ZOO


def documents(*lengths: int) -> list[torch.Tensor]:
    return [1000 * number + torch.arange(length) for number, length in enumerate(lengths)]


def test_a_row_keeps_to_its_document_until_it_ends() -> None:
    loader = CrossBatchLoader(documents(13, 8, 9, 20, 3), 2, 4)
    last: list[Any] = [None, None]
    seen = set()
    for batch in islice(loader, 12):
        ids, labels = batch["input_ids"], batch["labels"]
        assert ids.shape == labels.shape == (4, 4)
        assert bool((labels[:2] == -100).all())
        assert torch.equal(labels[2:], ids[2:])
        for row in range(2):
            before, now = ids[row], ids[2 + row]
            assert torch.equal(torch.cat([before, now]), before[0] + torch.arange(8))  # of one document, in its order
            seen.add(int(before[0]) // 1000)
            going_on = last[row] is not None and torch.equal(last[row], before)
            begins = int(before[0]) % 1000 == 0
            assert going_on or begins
            last[row] = now
    assert seen == {0, 1, 2, 3}  # the fifth is too short


def test_a_long_document_fills_consecutive_rows() -> None:
    loader = CrossBatchLoader(documents(30, 30), 4, 5, pack=2, separator=(7, 8))
    first, second = loader.take(2)
    for batch in (first, second):
        assert torch.equal(batch["input_ids"], batch["labels"])
        assert batch["input_ids"].shape == (4, 5)
    stream = torch.cat([first["input_ids"].flatten(), second["input_ids"].flatten()])
    order = [int(d[0]) for d in loader.documents]
    expected = torch.cat([part for d in loader.documents for part in (d, torch.tensor([7, 8]))])[:40]
    assert torch.equal(stream, expected)
    assert sorted(order) == [0, 1000]
    assert len(loader.take(30)) == 30


def test_orders_follow_the_seed() -> None:
    many = documents(*[9] * 20)
    orders = [[int(d[0]) for d in CrossBatchLoader(many, 2, 4, seed=seed).documents] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_schedules() -> None:
    stages = {0: 2, 10: (2, 8)}
    assert [focus_schedule(step, stages) for step in (0, 9)] == [2, 2]
    later = [focus_schedule(step, stages, seed=1) for step in range(10, 60)]
    assert set(later) == {2, 8}
    assert later == [focus_schedule(step, stages, seed=1) for step in range(10, 60)]
    for wrong in ({}, {5: 2}, {0: 0}, {0: ()}, {0: 1, -1: 2}):
        with pytest.raises(InputError, match="stages: got"):
            focus_schedule(0, wrong)


def test_the_loss_is_that_of_rows_with_labels() -> None:
    model = ZOO["llama"]()[0].eval()
    batch = next(iter(CrossBatchLoader([torch.arange(1, 30)] * 3, 2, 6)))
    expected = model(batch["input_ids"][2:], labels=batch["labels"][2:]).loss
    assert torch.allclose(next_token_loss(model, batch), expected, atol=1e-6)


@pytest.mark.parametrize("pack", [1, 2])
def test_training_lowers_the_loss_and_leaves_the_original_alone(pack: int) -> None:
    model = ZOO["llama"]()[0].eval()
    made = torch.Generator().manual_seed(0)
    texts = [torch.randint(1, 12, (40,), generator=made) for _ in range(6)]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings: dict[str, Any] = {"batch": 4, "window": 8, "pack": pack, "stages": {0: 1, 3: 4}, "learning_rate": 3e-3}
    told: list[int] = []
    handle = crossbatch(model, texts, [1], steps=15, progress=lambda _n, done, _t: told.append(done), **settings)
    assert told == list(range(1, 16))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    fresh = add_memory(model, [1])
    batch = CrossBatchLoader(texts, 4, 8, seed=3).take(1)[0]
    losses = []
    for held in (handle, fresh):
        with torch.no_grad(), held.crossing(2):
            losses.append(next_token_loss(held.model, batch).item())
    assert losses[0] < losses[1] - 0.3
    again = crossbatch(model, texts, [1], steps=15, **settings)
    for name, value in handle.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name
    more = crossbatch(handle.model, texts, steps=1, **settings)
    assert more.layers == handle.layers


def test_wrong_settings() -> None:
    model, texts = ZOO["llama"]()[0], documents(40, 40, 40)
    with pytest.raises(InputError, match="pack: got 2 for a batch of 3"):
        CrossBatchLoader(texts, 3, 4, pack=2)
    with pytest.raises(InputError, match="window: got 0"):
        CrossBatchLoader(texts, 3, 0)
    with pytest.raises(InputError, match="documents: 0 of 3"):
        CrossBatchLoader(texts, 3, 30)
    with pytest.raises(InputError, match="stages: 5 windows for a batch of 3"):
        crossbatch(model, texts, [1], batch=3, window=4, stages={0: 5})
    with pytest.raises(InputError, match="window: got 4096"):
        crossbatch(model, texts, [1], batch=3, window=4096)
