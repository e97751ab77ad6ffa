from __future__ import annotations

import statistics

import pytest
import torch

from layerwright.allocate.equal_parameters import equal_parameter_shapes
from layerwright.data.shape_grey import grey_scenes
from layerwright.models.masked_autoencoder import ImageClassifier
from layerwright.studies import bamboo
from layerwright.studies.bamboo import run, train_masked_, train_supervised_


def test_shapes_have_equal_parameters() -> None:
    shapes = equal_parameter_shapes(bamboo.PARAMS, bamboo.DEPTHS, heads=bamboo.HEADS, tolerance=0.05)
    assert [(s.layers, s.dim, s.heads, s.params) for s in shapes] == [
        (3, 56, 4, 112_896),
        (6, 40, 4, 115_200),
        (12, 28, 4, 112_896),
    ]
    assert [bamboo._model(s, 0).encoder.block_parameters() for s in shapes] == [s.params for s in shapes]


def test_training_is_repeatable_and_lowers_either_loss() -> None:
    shape = equal_parameter_shapes(20_000, [1], heads=4, tolerance=0.3)[0]
    images, labels = grey_scenes(240, size=bamboo.SIZE, seed=7)
    one, two = (train_masked_(bamboo._model(shape, 0), images, seed=3) for _ in range(2))
    assert not one.training
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    draws = [torch.Generator().manual_seed(0) for _ in range(2)]
    with torch.no_grad():
        before, after = (model(images[:64], generator=g)[0] for model, g in zip((bamboo._model(shape, 0), one), draws))
    assert float(after) < 0.95 * float(before)
    classifier = ImageClassifier(bamboo._model(shape, 0).encoder, 8)
    with torch.no_grad():
        first = float(torch.nn.functional.cross_entropy(classifier(images), labels))
        train_supervised_(classifier, (images, labels), rate=3e-3)
        assert float(torch.nn.functional.cross_entropy(classifier(images), labels)) < first


def test_quick_form() -> None:
    evidence = run(quick=True)
    assert evidence.slug == "bamboo" and evidence.seeds == (0,)
    trained = [row for row in evidence.table if row["objective"] != "untrained"]
    assert [(row["objective"], row["shape"]) for row in trained] == [
        ("masked", "3x56"),
        ("supervised", "3x56"),
        ("masked", "12x28"),
        ("supervised", "12x28"),
    ]
    rows = {(row["objective"], row["shape"]): row for row in trained}
    share, cosine, loss, interaction = evidence.checks
    masked, supervised = rows["masked", "12x28"], rows["supervised", "12x28"]
    assert share.measured == masked["hc, last"] and share.bound == pytest.approx(1.3 * supervised["hc, last"])
    assert cosine.measured == masked["cosine, last"] and cosine.bound == pytest.approx(supervised["cosine, last"] - 0.1)
    assert loss.measured == masked["masked loss"]
    assert loss.bound == pytest.approx(1.03 * rows["masked", "3x56"]["masked loss"])
    gains = [rows[o, "12x28"]["accuracy"] - rows[o, "3x56"]["accuracy"] for o in ("masked", "supervised")]
    assert interaction.measured == pytest.approx(gains[0] - gains[1]) and interaction.bound == 0
    assert [check.relation for check in evidence.checks] == [">=", "<=", "<=", ">="]
    for row in evidence.table:
        assert 0 < row["hc, last"] < 1 and -1 <= row["cosine, last"] <= 1
    # Shapes start with different tokens; the untrained rows are those of all three.
    assert len({row["hc, last"] for row in evidence.table}) == len(evidence.table)
    assert statistics.fmean(row["accuracy"] for row in trained) > 0.1


@pytest.mark.study
def test_masked_training_keeps_differences_between_tokens() -> None:
    evidence = run(seeds=1)
    share, cosine, loss, _ = evidence.checks
    assert share.holds and cosine.holds and loss.holds
