from __future__ import annotations

import statistics

import torch

from layerwright.data.demo_data import digits
from layerwright.studies.subtuning import BLOCKS, DigitsResNet, corrupted, run, target


def test_targets_have_ten_labels_for_each_class_and_test_on_others() -> None:
    for name in ("A", "B"):
        (x, y), (test_x, test_y) = target(name, 0)
        assert y.bincount().tolist() == [10] * 5 and set(test_y.tolist()) == set(range(5))
        distances = torch.cdist(x.flatten(1), test_x.flatten(1))
        assert float(distances.min()) > 0, "nothing is drawn and tested on"
        assert not torch.equal(target(name, 1)[0][0], x)
    images, _ = digits("heldout")
    flipped = corrupted(images)
    assert flipped.shape == images.shape and float(flipped.mean()) > 0 > float(images.mean())
    assert float(flipped.std()) < float(images.std())


def test_the_network_has_six_residual_blocks() -> None:
    model = DigitsResNet()
    shapes = []
    for name in BLOCKS:
        model.get_submodule(name).register_forward_hook(lambda _m, _a, out: shapes.append(tuple(out.shape[1:])))
    assert model.eval()(torch.zeros(2, 1, 8, 8)).shape == (2, 5)
    assert shapes == [(16, 8, 8)] * 3 + [(32, 4, 4)] * 3


def test_quick_form() -> None:
    evidence = run(quick=True, seeds=1)
    assert evidence.slug == "subtuning" and len(evidence.checks) == 7
    rows = [row for row in evidence.table if "seed" in row]
    assert [(row["target"], row["method"]) for row in rows] == [
        (name, method) for name in "AB" for method in ("linear", "full", "last block", "greedy", "random")
    ]
    measured = {check.name: check.measured for check in evidence.checks}
    by_method = {
        m: statistics.fmean(r["accuracy"] for r in rows if r["method"] == m) for m in ("greedy", "linear", "full")
    }
    assert abs(measured["accuracy, greedy - linear"] - (by_method["greedy"] - by_method["linear"])) < 1e-9
    assert measured["accuracy, greedy - linear"] > 0, "even a few steps"
    assert all(0 <= row["accuracy"] <= 1 for row in rows)
    chosen = [row["blocks"].split() for row in rows if row["method"] == "greedy"]
    assert all(set(blocks) <= set(BLOCKS) and len(blocks) <= 3 for blocks in chosen)
    assert 0 < measured["share of parameters that greedy trains"] < 1
    assert 0.3 < measured["time of two tasks stacked / separate, batch 1"] < 1.2
    profiles = [row for row in evidence.table if str(row["method"]).startswith("profile")]
    assert len(profiles) == 12
