from __future__ import annotations

import pytest
import torch

from layerwright.nn.patches import PatchConv
from layerwright.studies.vit_conv import PatchTransformer, exactness_rows, run, trained_residual
from layerwright.theory.conv_attention import span_residual


def test_training_comes_near_the_least_residual_and_not_below() -> None:
    for channels, patch, slack in (((3, 2), 4, 1.001), ((1, 1), 2, 1.5)):
        weight = torch.randn(*channels, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        least = span_residual(weight, patch, 6)
        assert least * (1 - 1e-9) <= trained_residual(weight, patch, 6, 100) < slack * least
        assert trained_residual(weight, patch, 6, 1) > 1.001 * least, "a step is not enough"
        assert trained_residual(weight, patch, 9, 100) < 1e-7


def test_the_network_mixes_tokens_only_by_its_mixers() -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 1, 16, 16)
    moved = images.unflatten(3, (4, 4)).flip(3).flatten(3)
    alone = PatchTransformer(torch.nn.Identity, 1, 5)
    torch.testing.assert_close(alone(moved), alone(images), atol=1e-5, rtol=1e-5)
    mixing = PatchTransformer(lambda: PatchConv(torch.nn.Conv2d(3, 3, 3, padding=1), 4), 1, 5)
    assert (mixing(moved) - mixing(images)).abs().max() > 1e-3


def test_rows_of_exactness() -> None:
    rows = exactness_rows((1, 2), (3, 7))
    assert [row["heads used"] for row in rows] == [9, 49, 9, 25]
    assert all(row["error, float64"] < 1e-12 < row["error, float32"] < 1e-5 for row in rows)


def test_quick_form() -> None:
    evidence = run(quick=True)
    assert evidence.slug == "vit-conv" and evidence.seeds == (0,)
    accuracies = {row["arm"]: row["accuracy"] for row in evidence.table if "accuracy" in row}
    assert set(accuracies) == {
        f"{task}, {arm}" for task in ("digits", "scenes") for arm in ("plain", "two-phase", "offsets")
    }
    sizes = {row["parameters"] for row in evidence.table if row["arm"].startswith("digits")}
    assert len(sizes) == 1, "all arms end as the same network"
    assert all(check.holds for check in evidence.checks[:5])
    assert evidence.checks[6].measured == accuracies["digits, two-phase"]
    assert evidence.checks[7].bound == pytest.approx(accuracies["scenes, plain"] + 0.03)
