from __future__ import annotations

from layerwright.studies.scaling_laws import run


def test_quick_form() -> None:
    evidence = run(quick=True, seeds=1)
    names = [check.name for check in evidence.checks]
    assert len(names) == 7
    assert all(check.holds for check in evidence.checks[1:4])
    ours = [row for row in evidence.table if row["runs"] == "ours"]
    assert len(ours) == 9 and all(0 < row["loss"] < 5.7 for row in ours)
    assert ours[2]["loss"] < ours[0]["loss"]
