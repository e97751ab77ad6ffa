from __future__ import annotations

import pytest
import torch

from layerwright.data.warp_pairs import warp_pairs
from layerwright.studies.chm import ARMS, RawMatcher, _kernel_weights, _prepared, kernel_times, run


@torch.no_grad()
def test_raw_matches_find_equal_pictures() -> None:
    model, maps = RawMatcher(16), torch.randn(1, 16, 6, 6, generator=torch.Generator().manual_seed(0))
    scores = model.match(maps, maps)
    assert scores.shape == (1, 12, 12, 12, 12) and scores.min() >= 0
    corners = [(0, 0), (0, 11), (11, 0), (11, 11)]
    for row, column in corners:
        assert scores[0, row, column].argmax() == row * 12 + column
        assert float(scores[0, row, column].max()) == pytest.approx(float(model.log_gain.exp()), rel=1e-5)


def test_arms_differ_in_their_kernels_alone() -> None:
    models = {name: arm.build(3) for name, arm in ARMS.items()}
    weights = {name: _kernel_weights(model) for name, model in models.items()}
    assert weights == {
        "raw": 0, "4-D psi": 110, "6-D psi": 275, "6-D iso": 60, "6-D full": 6250, "6-D center-pivot": 30,
    }  # fmt: skip
    for model in models.values():
        for conv in getattr(model, "convs", [model.conv] if hasattr(model, "conv") else []):
            assert torch.equal(conv.weight[..., 0, 0], torch.eye(16))
    again = ARMS["6-D psi"].build(3)
    assert torch.equal(again.chm6d.kernel.weight, models["6-D psi"].chm6d.kernel.weight)


def test_features_and_points_go_together() -> None:
    pairs = warp_pairs(3, 64, pictures=[torch.rand(3, 128, 128)], points=24, seed=0)
    maps, points = _prepared(pairs)
    assert maps.shape == (3, 2, 16, 8, 8) and points.shape == (3, 2, 24, 2)
    torch.testing.assert_close((points[:, 1] + 1) * 32, pairs.target_points)


def test_times_come_with_their_ratio() -> None:
    (row,) = kernel_times(1)
    assert row["ratio"] == pytest.approx(row["center-pivot, ms"] / row["psi, ms"]) and row["ratio"] > 0


def test_quick_form() -> None:
    evidence = run(quick=True)
    assert evidence.slug == "chm" and evidence.seeds == (0,)
    rows = {row["arm"]: row for row in evidence.table if "PCK@0.1" in row}
    assert set(rows) == set(ARMS)
    shares = {name: row["PCK@0.1"] for name, row in rows.items()}
    checks = evidence.checks
    assert checks[0].measured == shares["6-D psi"] and checks[0].bound == pytest.approx(shares["raw"] + 0.08)
    changed = "PCK@0.1, scale changed"
    assert checks[1].measured == rows["6-D psi"][changed] and checks[1].bound == pytest.approx(
        rows["4-D psi"][changed] + 0.01
    )
    assert checks[2].bound == pytest.approx(shares["6-D full"] - 0.02)
    assert checks[3].measured == pytest.approx(275 / 6250)
    assert checks[4].measured == shares["6-D center-pivot"] and checks[4].bound == pytest.approx(
        shares["6-D psi"] - 0.03
    )
    assert all(row["PCK@0.05"] <= row["PCK@0.1"] <= row["PCK@0.15"] for row in rows.values())
