from __future__ import annotations

import pytest
import torch

from layerwright.core.errors import InputError, NotFiniteError
from layerwright.score.linear_probe import linear_probe


def test_it_separates_what_is_separable_and_nothing_else() -> None:
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (600,), generator=draw)
    shown = torch.nn.functional.one_hot(labels, 3) * 4 + torch.randn(600, 3, generator=draw)
    noise = torch.randn(600, 3, generator=draw)
    assert linear_probe(shown[:400] * 100 + 7, labels[:400], shown[400:] * 100 + 7, labels[400:]) > 0.97
    assert linear_probe(noise[:400], labels[:400], noise[400:], labels[400:]) < 0.45


def test_it_finds_the_optimum_of_scikit_learn() -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    draw = torch.Generator().manual_seed(1)
    x, labels = torch.randn(300, 5, generator=draw), torch.randint(4, (300,), generator=draw)
    x[:, 0] += labels
    a, b = x[:200], x[200:]
    mean, scale = a.mean(0), a.std(0)
    theirs = linear.LogisticRegression(C=1 / (0.01 * 200), max_iter=1000).fit((a - mean) / scale, labels[:200])
    expected = (theirs.predict((b - mean) / scale) == labels[200:].numpy()).mean()
    assert linear_probe(a, labels[:200], b, labels[200:], penalty=0.01, steps=200) == pytest.approx(expected, abs=0.011)


def test_bad_input() -> None:
    x, labels = torch.randn(6, 2), torch.tensor([0, 1] * 3)
    with pytest.raises(InputError, match="features: got"):
        linear_probe(x, labels[:3], x, labels)
    with pytest.raises(InputError, match="1 classes"):
        linear_probe(x, labels * 0, x, labels * 0)
    with pytest.raises(NotFiniteError):
        linear_probe(x / 0, labels, x, labels)
