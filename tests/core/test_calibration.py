"""Calibration data: what is refused, what is weighted, what is fed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from layerwright.core.calibration import Calibration, as_calibration, evaluating
from layerwright.core.errors import InputError


def pairs(*sizes: int) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(n, 3, generator=generator), torch.zeros(n, dtype=torch.long)) for n in sizes]


def test_empty_and_non_finite_data_are_refused() -> None:
    with pytest.raises(InputError, match="is empty"):
        Calibration([])
    with pytest.raises(InputError, match="batch 0 holds NaN"):
        Calibration([{"x": torch.tensor([1.0, float("inf")])}])
    for data in (None, "text", torch.ones(2), 3):
        with pytest.raises(TypeError, match="expected a Calibration or a list"):
            as_calibration(data)


def test_the_mean_loss_weighs_batches_by_their_samples() -> None:
    model, batches = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 2)), pairs(1, 4)
    model.train()
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    expected = float(nn.functional.cross_entropy(model[1](x), y).detach())
    assert Calibration(batches).mean_loss(model) == pytest.approx(expected, rel=1e-6)
    assert model.training and model[0].training


def test_an_iterator_is_walked_more_than_once_and_head_takes_whole_batches() -> None:
    data = Calibration(iter(pairs(2, 2, 2)))
    assert len(list(data)) == len(list(data)) == 3 and data.samples == 6
    assert data.head(3).samples == 4
    assert data.fingerprint() == Calibration(pairs(2, 2, 2)).fingerprint() != data.head(3).fingerprint()


def test_windows_never_overlap() -> None:
    def tokenizer(texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(c) for c in text] for text in texts]}

    text = "".join(map(chr, range(100)))
    data = Calibration.from_text([text], tokenizer, samples=50, length=16)
    tokens = torch.cat([batch["input_ids"] for batch in data]).flatten()
    assert len(tokens) == 6 * 16 and len(tokens.unique()) == len(tokens)
    with pytest.raises(InputError, match="fewer than one window of 101"):
        Calibration.from_text([text], tokenizer, length=101)
    with pytest.raises(InputError, match="text needs a tokenizer, got NoneType"):
        Calibration.from_text([text], None)


def test_no_loss_is_an_error_that_says_what_to_pass() -> None:
    with pytest.raises(TypeError, match="pass loss_fn"):
        Calibration([torch.ones(1, 3)]).loss(nn.Linear(3, 2), torch.ones(1, 3))


def test_evaluating_puts_each_module_back_as_it_was() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Dropout().eval()).train()
    model[1].eval()
    with pytest.raises(KeyError), evaluating(model):
        assert not model.training and not model[0].training
        raise KeyError
    assert [model.training, model[0].training, model[1].training] == [True, True, False]
