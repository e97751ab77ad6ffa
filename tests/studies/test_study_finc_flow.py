from __future__ import annotations

import pytest
import torch

from layerwright.studies.finc_flow import MARGINS, _exponent, checkerboards, run


def test_checkerboards_are_checks() -> None:
    pictures = checkerboards(200, seed=3)
    assert pictures.shape == (200, 1, 8, 8) and pictures.dtype == torch.long
    assert pictures.min() >= 0 and pictures.max() <= 16
    assert torch.equal(pictures, checkerboards(200, seed=3)) and not torch.equal(pictures, checkerboards(200, seed=4))
    # Two rows of checks are equal or opposite, but for the noise.
    centred = (
        pictures.double()[:, 0]
        - (pictures.double().amax((1, 2, 3)) + pictures.double().amin((1, 2, 3)))[:, None, None] / 2
    )
    signs = centred.sign()
    agree = (signs[:, :1] * signs[:, 1:]).mean(-1).abs()
    assert float((agree == 1).double().mean()) > 0.9
    assert 0.3 < float((signs[:, 0, 0] > 0).double().mean()) < 0.7


def test_exponents_are_slopes_of_logarithms() -> None:
    rows = [{"size": n, "t": 3.0 * n**1.7} for n in (8, 16, 32)]
    assert _exponent(rows, "t") == pytest.approx(1.7)


def test_quick_form() -> None:
    evidence = run(quick=True)
    assert evidence.slug == "finc-flow" and evidence.seeds == (0,)
    assert [row["steps"] for row in evidence.table if "steps" in row] == [15, 31, 63]
    assert evidence.checks[0].measured == 0 and evidence.checks[1].measured > 1
    bits = {row["arm"]: row["bits/dim"] for row in evidence.table if "bits/dim" in row}
    assert len(bits) == 4 and all(1 < value < 8 for value in bits.values())
    for data, margin in MARGINS.items():
        check = next(c for c in evidence.checks if c.name.startswith(data))
        assert check.measured == bits[f"{data}, finc + 1x1"]
        assert check.bound == pytest.approx(bits[f"{data}, 1x1 alone"] - margin)
