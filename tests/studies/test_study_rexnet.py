from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from layerwright.models.backbone import count_macs
from layerwright.studies import rexnet


def test_arms_cost_the_same() -> None:
    lists = rexnet.channel_lists()
    assert lists["stagewise"] == [8, 16, 16, 32, 32, 32, 32, 32]
    steps = [b - a for a, b in pairwise(lists["linear"])]
    assert max(steps) - min(steps) <= 1
    assert len(set(lists["constant"])) == 1
    macs, parameters = rexnet._cost(lists["stagewise"])
    linear = rexnet._cost(lists["linear"])
    assert abs(linear[0] / macs - 1) <= 0.02 and abs(linear[1] / parameters - 1) <= 0.05


def test_the_formula_counts_what_the_network_has() -> None:
    for channels in rexnet.channel_lists().values():
        with torch.device("meta"):
            model = rexnet._network(channels, 6).eval()
        counted = (count_macs(model, rexnet.SIZE), sum(p.numel() for p in model.parameters()))
        assert rexnet._cost(channels, 6) == counted


def test_stripes_are_waves_of_their_class() -> None:
    images, labels = rexnet.stripes(400, seed=1)
    again, _ = rexnet.stripes(400, seed=1)
    assert torch.equal(images, again) and images.shape == (400, 3, 32, 32)
    assert torch.bincount(labels, minlength=10).min() > 20
    power = torch.fft.fft2(images - images.mean((2, 3), keepdim=True)).abs().square().sum(1).flatten(1)
    peak = power[:, 1:].argmax(1) + 1
    rows, columns = (torch.fft.fftfreq(32)[place] for place in (peak // 32, peak % 32))
    frequency = torch.hypot(rows, columns)
    narrow = labels < 5
    assert (frequency[narrow] > 0.15).float().mean() > 0.9 and (frequency[~narrow] < 0.2).float().mean() > 0.9
    angle = torch.atan2(rows, columns) / torch.pi * 5 % 5
    distance = (angle - labels % 5).abs()
    assert (torch.minimum(distance, 5 - distance)[narrow] < 0.9).float().mean() > 0.9


def test_quick_form() -> None:
    evidence = rexnet.run(quick=True)
    assert evidence.slug == "rexnet"
    checks = {check.name: check for check in evidence.checks}
    assert len(checks) == 11
    assert all(check.holds for name, check in checks.items() if name.startswith(("rank:", "widths:")))
    rows = {row["arm"]: row for row in evidence.table if row["arm"].startswith("shapes")}
    check = checks["shapes: accuracy, linear against stagewise - 0.005"]
    assert check.measured == rows["shapes: linear"]["accuracy"]
    assert check.bound == pytest.approx(rows["shapes: stagewise"]["accuracy"] - 0.005)
    assert all(0 < row["nuclear"] <= 1 for row in evidence.table)


@pytest.mark.study
def test_full_form() -> None:
    """What was found to hold: ranks and equal costs; that linear widths are no worse did not, and is reported so."""
    evidence = rexnet.run()
    assert all(check.holds for check in evidence.checks if check.name.startswith(("rank:", "widths:")))
    means = [row["accuracy"] for row in evidence.table if row["arm"] == "texture: linear"]
    assert len(means) == 3 and min(means) > 0.7
