from __future__ import annotations

import pytest
import torch
from torch import Tensor

from layerwright.explain.receptive_field import receptive_field
from layerwright.studies.cswin import (
    ARMS,
    PALETTE,
    TwoBlocks,
    attention_macs,
    forward_times,
    pair_pictures,
    quadrant_pictures,
    run,
)


def _marks(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean colour of each cell, and which cells are marks."""
    cells = (images * 0.2 + 0.25).view(-1, 3, 8, 4, 8, 4).mean((3, 5)).permute(0, 2, 3, 1)
    return cells, cells.amax(-1) > 0.5


def test_pairs_lie_on_a_line_far_apart_and_the_label_is_whether_colours_agree() -> None:
    images, labels = pair_pictures(300, seed=5)
    assert images.shape == (300, 3, 32, 32) and 0.4 < float(labels.double().mean()) < 0.6
    cells, marks = _marks(images)
    assert (marks.sum((1, 2)) == 2).all()
    rows, columns = (marks.nonzero()[:, axis].view(300, 2) for axis in (1, 2))
    apart = torch.stack([(rows[:, 0] - rows[:, 1]).abs(), (columns[:, 0] - columns[:, 1]).abs()])
    assert (apart.amin(0) == 0).all() and (apart.amax(0) >= 4).all()
    assert 0.3 < float((apart[0] == 0).double().mean()) < 0.7, "rows and columns"
    kinds = torch.cdist(cells[marks], PALETTE).argmin(1).view(300, 2)
    assert torch.equal(kinds[:, 0] == kinds[:, 1], labels == 1)
    assert torch.equal(images, pair_pictures(300, seed=5)[0])


def test_quadrants_are_those_of_the_mark() -> None:
    images, labels = quadrant_pictures(200, seed=5)
    marks = _marks(images)[1]
    assert (marks.sum((1, 2)) == 1).all()
    _, row, column = marks.nonzero().unbind(1)
    assert torch.equal(labels, 2 * (row >= 4) + (column >= 4)) and len(labels.unique()) == 4


def test_arms_have_equal_parameters_and_their_own_reach() -> None:
    torch.manual_seed(0)
    models = {arm: TwoBlocks(arm, 2).eval() for arm in ARMS}
    assert len({sum(p.numel() for p in model.parameters()) for model in models.values()}) == 1
    seen = {
        arm: int((receptive_field(model.blocks, (1, 8, 8, 32), (2, 5), channels_last=True) > 0).sum())
        for arm, model in models.items()
    }
    assert seen == {"cross-shaped": 64, "square": 16, "axial": 64, "full": 64}
    # Two layers of 64 positions, 32 channels: projections, 9 for the encoding, and both products over 2 * 8, 4 * 4 or 64 positions.
    expected = {
        arm: 2 * 64 * 32 * (4 * 32 + 9 + 2 * keys)
        for arm, keys in (("cross-shaped", 16), ("square", 16), ("axial", 16), ("full", 64))
    }
    assert {arm: attention_macs(model) for arm, model in models.items()} == expected


def test_without_encodings_values_pass_alone() -> None:
    torch.manual_seed(0)
    model = TwoBlocks("cross-shaped", 4, stripe_width=1, lepe=False)
    frozen = [parameter for name, parameter in model.named_parameters() if "lepe" in name]
    assert len(frozen) == 8 and not any(p.requires_grad or p.any() for p in frozen)
    assert all(p.any() for name, p in TwoBlocks("cross-shaped", 4).named_parameters() if "lepe" in name)


def test_times_take_turns() -> None:
    times = forward_times((1, 2), side=8, rounds=2)
    assert list(times) == ["stripe width 1", "stripe width 2", "full"]
    assert all(len(spent) == 2 and min(spent) > 0 for spent in times.values())


def test_quick_form() -> None:
    evidence = run(quick=True)
    assert evidence.slug == "cswin" and evidence.seeds == (0,)
    accuracies = {row["arm"]: row["accuracy"] for row in evidence.table if "accuracy" in row}
    assert list(accuracies) == [f"pair, {arm}" for arm in ARMS] + ["quadrant, LePE", "quadrant, no LePE"]
    checks = evidence.checks
    assert [check.measured for check in checks[:2]] == [accuracies["pair, cross-shaped"]] * 2
    assert checks[0].bound == pytest.approx(accuracies["pair, square"] + 0.08)
    assert checks[1].bound == pytest.approx(accuracies["pair, full"] - 0.03)
    assert checks[2].measured == pytest.approx((4 * 32 + 9 + 32) / (4 * 32 + 9 + 128))
    assert checks[3].bound == pytest.approx(accuracies["quadrant, no LePE"] + 0.01)
    assert checks[4].bound == 3 and checks[4].measured > 1
