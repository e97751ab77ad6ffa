from __future__ import annotations

import pytest
import torch
from torch import nn

from layerwright.core.errors import InputError
from layerwright.models.keypoint_transfer import pck
from layerwright.studies.vision import (
    accuracy,
    calibration_error,
    few_shot,
    fit_,
    mean_iou,
    pointing_game,
    shifted,
    split_digits,
    worst_of,
)


def small(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 10)
    )


def test_digits_are_split_by_class_and_standardised() -> None:
    train, validation, test = split_digits()
    assert [len(part[1]) for part in (train, validation, test)] == [1079, 359, 359] or len(train[1]) > 1070
    assert sum(len(part[1]) for part in (train, validation, test)) == 1797
    for _, labels in (train, validation, test):
        share = labels.bincount(minlength=10) / len(labels)
        assert share.min() > 0.085 and share.max() < 0.115
    assert float(train[0].mean()) == pytest.approx(0, abs=1e-5) and float(train[0].std()) == pytest.approx(1, abs=1e-5)
    assert split_digits(16, 3)[0][0].shape[1:] == (3, 16, 16)
    few = few_shot(train, 5)
    assert few[1].bincount().tolist() == [5] * 10
    with pytest.raises(InputError, match="per_class"):
        few_shot(train, 500)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_training_learns_and_repeats(optimizer: str) -> None:
    train, _, test = split_digits()
    runs = []
    for _ in range(2):
        model = small()
        losses = fit_(model, *train, epochs=3, optimizer=optimizer, seed=1, augment=shifted)  # type: ignore[arg-type]
        runs.append((losses, model[4].weight.detach().clone()))
        assert not model.training
    assert runs[0][0] == runs[1][0] and torch.equal(runs[0][1], runs[1][1])
    assert accuracy(model, *test) > 0.85
    assert len(runs[0][0]) == 3 * (1079 // 64 + (1079 % 64 >= 32))


def test_named_parameters_do_not_decay() -> None:
    model = nn.Linear(4, 3, bias=False)
    before = model.weight.detach().clone()

    def still(running: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return running(images).sum() * 0

    data = (torch.zeros(64, 4), torch.zeros(64, dtype=torch.long))
    fit_(model, *data, epochs=1, loss_fn=still, undecayed=frozenset({"weight"}))
    assert torch.equal(model.weight, before)
    fit_(model, *data, epochs=1, loss_fn=still)
    assert not torch.equal(model.weight, before)
    with pytest.raises(InputError, match="labels"):
        fit_(model, data[0], data[1][:3])
    with pytest.raises(InputError, match="epochs"):
        fit_(model, *data, epochs=0)


def test_measures_on_small_examples() -> None:
    true, found = torch.tensor([[0, 0, 1], [1, 2, 2]]), torch.tensor([[0, 1, 1], [1, 2, 0]])
    assert mean_iou(found, true, 3) == pytest.approx((1 / 3 + 2 / 3 + 1 / 2) / 3)
    assert mean_iou(true, true, 5) == 1.0
    maps = torch.zeros(2, 5, 5)
    maps[0, 2, 2] = maps[1, 0, 0] = 1
    masks = torch.zeros(2, 5, 5, dtype=torch.bool)
    masks[0, 2, 3] = masks[1, 4, 4] = True
    assert pointing_game(maps, masks) == 0 and pointing_game(maps, masks, margin=1) == 0.5
    points = torch.tensor([[[0.0, 0.0], [3.0, 4.0]]])
    assert pck(points, torch.zeros(1, 2, 2), torch.tensor([50.0]), [0.09]) == 0.5
    assert pck(points, torch.zeros(1, 2, 2), torch.tensor([50.0]), [0.1]) == 1.0
    assert pck(points, torch.zeros(1, 2, 2), torch.tensor([50.0]), [0.09], torch.tensor([[True, False]])) == 1.0
    logits = torch.tensor([[10.0, -10.0], [10.0, -10.0]])
    assert calibration_error(logits, torch.tensor([0, 1])) == pytest.approx(0.5, abs=1e-3)
    rows = [{"arm": "a", "x": 1.0}, {"arm": "a", "x": 3.0}, {"arm": "b", "x": 0.0}]
    assert worst_of(rows, "a", "x") == 1.0 and worst_of(rows, "a", "x", largest=True) == 3.0


def test_shifts_move_whole_pictures() -> None:
    images = torch.arange(36.0).reshape(1, 1, 6, 6).expand(50, -1, -1, -1)
    moved = shifted(images, torch.Generator().manual_seed(0))
    inner = moved[:, 0, 2, 2] - images[0, 0, 2, 2]
    assert set(inner.tolist()) == {float(6 * a + b) for a in (-1, 0, 1) for b in (-1, 0, 1)}
