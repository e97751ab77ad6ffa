from __future__ import annotations

import pytest
import torch

from layerwright.nn.classifier_heads import GlobalAvgHead
from layerwright.studies.patchconvnet import ARMS, class_activation_maps, mass_and_area, run, target_cells


def test_cells_hold_pixels_of_the_target_and_shares_are_of_the_widened_ones() -> None:
    instance = torch.zeros(1, 16, 16, dtype=torch.long)
    instance[0, 3, 8:9] = 1
    cells = target_cells(instance, 4)
    assert cells.nonzero().tolist() == [[0, 0, 2]]
    maps = torch.full((1, 4, 4), 2.0)
    assert mass_and_area(maps, cells) == pytest.approx((6 / 16, 6 / 16))
    maps[0, 0, 2] = 12
    assert mass_and_area(maps, cells) == pytest.approx((22 / 42, 6 / 16))


@torch.no_grad()
def test_class_activation_maps_average_to_the_logit() -> None:
    torch.manual_seed(0)
    head, features, classes = GlobalAvgHead(5, 3), torch.randn(4, 5, 2, 6), torch.tensor([0, 2, 1, 2])
    maps = class_activation_maps(head.fc.weight, features, classes)
    expected = head(features)[torch.arange(4), classes] - head.fc.bias[classes]
    torch.testing.assert_close(maps.mean((1, 2)), expected)


def test_quick_form() -> None:
    evidence = run(quick=True)
    assert evidence.slug == "patchconvnet" and evidence.seeds == (0,)
    rows = {row["arm"]: row for row in evidence.table}
    assert set(rows) == {*ARMS, "memory, columnar", "memory, pyramid"}
    measured = [check.measured for check in evidence.checks]
    gathered, average = rows["aggregation"], rows["average"]
    assert measured == [
        gathered["accuracy"], gathered["accuracy, small"], gathered["mass over area"], gathered["pointing"],
        gathered["pointing"],
    ]  # fmt: skip
    assert evidence.checks[0].bound == pytest.approx(average["accuracy"] - 0.005)
    assert evidence.checks[1].bound > average["accuracy, small"]
    assert evidence.checks[4].bound == pytest.approx(average["pointing"] + 0.05)
    for arm in ARMS[1:]:
        assert 0 < rows[arm]["area"] < 0.3 and rows[arm]["mass over area"] > 0.5
    counted = [rows[f"memory, {name}"] for name in ("columnar", "pyramid")]
    assert counted[0]["million multiply-adds"] == pytest.approx(counted[1]["million multiply-adds"], rel=0.1)
    assert all(row["MB of the largest map"] < row["MB kept to train"] for row in counted)
