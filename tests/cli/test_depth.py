from __future__ import annotations

import json
from pathlib import Path

import pytest

from layerwright.cli.main import main


def test_table_json_and_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "depth.html"
    assert main(["depth", "demo:lm", "--samples", "2", "--length", "32", "-o", str(page), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["model"] == "demo:lm" and len(found["blocks"]) == 8
    assert all(block["variance"] > 0 and 0 < block["angle"] < 1 and block["gap"] > 0 for block in found["blocks"])
    assert max(block["missed"] for block in found["blocks"]) > 0.1
    assert "Rise of the loss without each block" in page.read_text()
    assert main(["depth", "demo:vit", "--samples", "32", "--no-drops"]) == 0
    assert "variance after it" in capsys.readouterr().out


def test_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["depth", "no/such/folder"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
