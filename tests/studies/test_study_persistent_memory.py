from __future__ import annotations

import math

from layerwright.studies.persistent_memory import arms, run


def test_quick_form() -> None:
    evidence = run(quick=True, seeds=1)
    assert evidence.slug == "persistent-memory"
    rows = {row["arm"]: row for row in evidence.table}
    assert list(rows) == [arm.name for arm in arms()]
    first, second, third, fourth = rows.values()
    assert evidence.checks[0].holds
    assert second["parameters"] == fourth["parameters"] > 1.5 * third["parameters"]
    assert first["parameters"] > 1.5 * third["parameters"]
    for row in rows.values():
        assert not row["failed"]
        assert row["bits/byte"] < math.log2(256)
    assert "persistent mass" not in first
    for row in (second, fourth):
        assert 0 <= row["least"] <= row["persistent mass"] <= row["most"] <= 1
    assert second["bits/byte"] != fourth["bits/byte"]
