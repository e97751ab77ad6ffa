from __future__ import annotations

import torch

from layerwright.nn.spiral import spiral_offsets
from layerwright.studies.spiralmlp import SpiralNet, axial_offsets, diagonal_pairs, random_offsets, run


def test_quick_form() -> None:
    found = run(quick=True)
    assert found.slug == "spiralmlp" and found.seeds == (0,)
    arms = {row["arm"] for row in found.table}
    assert {"single, spiral", "single, axial", "single, none", "diagonal, axial"} <= arms
    assert len(found.checks) == 6 and all(check.measured == check.measured for check in found.checks)


def test_dots_lie_on_the_diagonal_that_the_label_names() -> None:
    images, labels = diagonal_pairs(200, seed=1)
    assert images.shape == (200, 3, 16, 16) and 60 < int(labels.sum()) < 140
    for image, label in zip(images[:, 0, ::2, ::2] > 0.5, labels.tolist(), strict=True):
        (top, first), (bottom, second) = image.nonzero().tolist()
        assert bottom - top == (first - second if label else second - first)
        assert 2 <= bottom - top <= 3


def test_other_offsets() -> None:
    axial = axial_offsets(32, 7)
    assert bool(((axial == 0).sum(1) >= 1).all()) and axial.abs().max() == 7
    length = spiral_offsets(32, 1, 7).double().norm(dim=1)
    assert bool(((axial.double().norm(dim=1) - length).abs() <= 1).all())
    assert random_offsets(500, 3).unique().tolist() == [-3, -2, -1, 0, 1, 2, 3]


def test_arms_have_as_many_parameters() -> None:
    counts = {arm: sum(p.numel() for p in SpiralNet(arm, 4, 4, 7).parameters()) for arm in ("spiral", "axial", "none")}
    assert len(set(counts.values())) == 1
    depthwise = sum(p.numel() for p in SpiralNet("depth-wise", 4, 4, 7).parameters())
    assert depthwise - counts["spiral"] == 2 * 32 * 10
    net = SpiralNet("none", 4, 4, 7)
    x = torch.randn(1, 3, 32, 32)
    moved = x.roll((4, 8), (2, 3))
    torch.testing.assert_close(net(moved), net(x), msg="without offsets the order of the patches does not matter")
