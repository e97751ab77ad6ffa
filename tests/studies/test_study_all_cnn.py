from __future__ import annotations

import pytest
import torch

from layerwright.studies.all_cnn import energy_share, run


def test_energy_is_counted_inside_the_wider_box() -> None:
    maps = torch.zeros(2, 2, 6, 6)
    maps[0, 0, 2, 2], maps[0, 1, 5, 5], maps[0, 0, 0, 0] = 3.0, 4.0, -9.0
    maps[1, 0, 1, 3] = 1.0
    boxes = torch.tensor([[2, 2, 4, 4], [4, 2, 6, 4]])
    assert energy_share(maps, boxes, margin=0).tolist() == pytest.approx([9 / 25, 0.0])
    assert energy_share(maps, boxes, margin=1).tolist() == pytest.approx([9 / 25, 1.0])


def test_quick_form() -> None:
    evidence = run(quick=True)
    assert evidence.slug == "all-cnn"
    rows = {row["arm"]: row for row in evidence.table}
    assert rows["base"]["parameters"] < rows["all"]["parameters"]
    assert evidence.checks[0].measured == rows["all"]["error"]
    assert evidence.checks[0].bound == pytest.approx(rows["base"]["error"] + 0.01)
    shares = {mode: rows[f"map: {mode}"]["energy in the box"] for mode in ("guided", "deconv", "grad")}
    assert all(0 < share < 1 for share in shares.values())
    assert all(0 < rows[f"map: {mode}"]["sum in the box"] < 1 for mode in shares)
    assert rows["map: deconv"]["sum in the box"] != shares["deconv"]
    assert evidence.checks[1].measured == evidence.checks[2].measured == shares["guided"]
