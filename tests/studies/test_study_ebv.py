from __future__ import annotations

import pytest
import torch

from layerwright.nn.equiangular import welch_bound
from layerwright.studies import ebv
from layerwright.studies.ebv import CLASSES, run, shapes_and_digits


def test_hues_are_those_of_the_colours() -> None:
    colours = torch.tensor([[0.9, 0.2, 0.2], [0.2, 0.9, 0.2], [0.2, 0.2, 0.9]])
    images = colours[:, :, None, None].expand(-1, -1, 4, 4)
    assert ebv._hue(images, torch.ones(3, 4, 4)).tolist() == pytest.approx([0, 1 / 3, 2 / 3], abs=1e-5)


def test_every_class_is_drawn_and_parts_differ() -> None:
    images, labels = shapes_and_digits(6)
    assert images.shape[1:] == (3, 32, 32) and CLASSES == 64
    assert labels.unique().tolist() == list(range(64))
    assert set(labels.bincount().tolist()) == {6}
    # Colours: the red part of the mean colour is largest in the classes of the first hue.
    place = (labels - 10) % 9 // 3
    means = images.mean((2, 3))
    assert means[(labels > 9) & (place == 0)].mean(0).argmax() == 0
    assert means[(labels > 9) & (place == 2)].mean(0).argmax() == 2
    other = shapes_and_digits(6, 2)[0]
    assert not any(bool((picture == other).flatten(1).all(1).any()) for picture in images)


def test_quick_form() -> None:
    evidence = run(quick=True)
    assert evidence.slug == "ebv"
    made = evidence.table[0]
    assert made["Welch bound"] == pytest.approx(welch_bound(64, 16))
    assert made["Welch bound"] < made["largest |cos|"] < made["random start"]
    rows = {row["arm"]: row for row in evidence.table[1:]}
    assert list(rows) == ["fc", "EBV, 64", "EBV, 16", "random, 16"]
    assert rows["fc"]["head parameters"] == 128 * 64 and rows["EBV, 16"]["head parameters"] == 128 * 16
    checks = {check.name: check for check in evidence.checks}
    near = checks["accuracy of EBV, 16 against fc - 0.03"]
    assert near.measured == rows["EBV, 16"]["accuracy"]
    assert near.bound == pytest.approx(rows["fc"]["accuracy"] - 0.03)
    assert all(row["accuracy"] > 3 / 64 for row in rows.values())
    assert checks["64 vectors of 16: largest |cos| over the Welch bound"].bound == 1.35
