from __future__ import annotations

import pytest

from layerwright.studies.hybrid_qcnn import run, time_loop


def test_quick_form() -> None:
    evidence = run(quick=True)
    assert evidence.slug == "hybrid-qcnn"
    rows = {row["arm"]: row for row in evidence.table}
    assert list(rows) == ["ry", "bell", "real_amplitudes", "classical 8-16-10"]
    assert rows["classical 8-16-10"]["parameters"] - rows["real_amplitudes"]["parameters"] == 8 * 16 + 16
    assert rows["ry"]["entanglement"] < 1e-6 < 0.01 < rows["real_amplitudes"]["entanglement"]
    checks = {check.name: check for check in evidence.checks}
    first = checks["accuracy of real_amplitudes against ry + 0.01"]
    assert first.measured == rows["real_amplitudes"]["accuracy"]
    assert first.bound == pytest.approx(rows["ry"]["accuracy"] + 0.01)
    gaps = [abs(row["accuracy"] - row["accuracy at 800 shots"]) for row in evidence.table[:3]]
    assert checks["accuracy at 800 shots, apart from exact, mean"].measured == pytest.approx(sum(gaps) / 3)
    assert max(row["accuracy"] for row in evidence.table) > 0.2


def test_times_of_a_loop() -> None:
    pytest.importorskip("pennylane")
    taken = time_loop(batch=32, samples=2, rounds=1)
    assert taken["loop"] > 3 * taken["batched"] > 0
