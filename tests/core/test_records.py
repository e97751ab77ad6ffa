"""Records survive a kill."""

from __future__ import annotations

from pathlib import Path

import pytest

from layerwright.core.errors import InputError
from layerwright.core.records import ApplyReport, LayerRecord


def test_each_record_is_on_disk_at_once_and_a_cut_line_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "apply.jsonl"
    report = ApplyReport(path=file)
    for layer in ("a", "b", "a"):
        report.add(LayerRecord(layer, "int4", "done", "as planned", tokens=len(report)))
    assert len(file.read_text().splitlines()) == 3
    assert [(r.layer, r.tokens) for r in report] == [("b", 1), ("a", 2)]
    with file.open("a") as handle:
        handle.write('{"layer": "c", "treat')
    again = ApplyReport.load(file)
    assert {r.layer: r.tokens for r in again} == {"b": 1, "a": 2}
    again.save(file)
    assert ApplyReport.load(file).records == again.records
    assert again.counts() == {"done": 2} and str(again) == "2 layers: 2 done"


def test_reasons_come_from_the_closed_list() -> None:
    with pytest.raises(InputError, match="is not one of the known reasons"):
        LayerRecord("a", "int4", "done", "because")  # type: ignore[arg-type]
