from __future__ import annotations

import statistics

import pytest

from layerwright.allocate.mixer_sizes import mixer_connections
from layerwright.studies.pk_mixer import BEST, SIZES, run


def test_sizes_have_equal_connections() -> None:
    assert all(mixer_connections(*size) == pytest.approx(8190, rel=0.02) for size in SIZES)
    assert max(SIZES, key=lambda size: size[0] * size[1]) == BEST


def test_quick_form() -> None:
    evidence = run(quick=True)
    assert evidence.slug == "pk-mixer"
    found = {row["arm"]: row["accuracy"] for row in evidence.table if "accuracy" in row}
    assert len(found) == 2 * len(SIZES)
    others = [found[f"mixer {s}x{c}"] for s, c in SIZES if (s, c) != BEST]
    assert evidence.checks[0].measured == found["mixer 16x16"] and evidence.checks[0].bound == max(others)
    assert evidence.checks[1].bound == pytest.approx(statistics.fmean(others) + 0.007)
    assert evidence.checks[2].measured == found["permuted 16x16"] > 0.5
    assert 0 < evidence.checks[3].measured <= 1
