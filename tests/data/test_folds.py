from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layerwright.core.errors import InputError
from layerwright.data.folds import stratified_folds


@given(st.lists(st.integers(5, 12), min_size=2, max_size=4), st.integers(2, 5), st.integers(0, 9))
def test_each_sample_is_judged_once_and_classes_are_even(counts: list[int], folds: int, seed: int) -> None:
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    parts = stratified_folds(labels, folds, seed)
    assert len(parts) == folds
    judged = torch.cat([held for _, held in parts])
    assert judged.sort().values.tolist() == list(range(len(labels)))
    for fitted, held in parts:
        assert sorted([*fitted.tolist(), *held.tolist()]) == list(range(len(labels)))
        for label, count in enumerate(counts):
            assert count // folds <= int((labels[held] == label).sum()) <= -(-count // folds)


def test_seeds() -> None:
    labels = torch.arange(30) % 3
    a, b, c = (stratified_folds(labels, 3, seed)[0][1].tolist() for seed in (0, 0, 1))
    assert a == b != c


@pytest.mark.parametrize(
    ("labels", "folds", "message"),
    [
        (torch.arange(12) % 3, 1, "folds: got 1"),
        (torch.tensor([0, 0, 0, 1, 1]), 3, "folds: got 3, and class 1 has 2 samples"),
        (torch.zeros(4), 2, "labels"),
        (torch.zeros(4, 2, dtype=torch.long), 2, "labels"),
        (torch.zeros(0, dtype=torch.long), 2, "labels"),
    ],
)
def test_wrong_input_is_refused(labels: torch.Tensor, folds: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        stratified_folds(labels, folds)
