from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from layerwright.allocate.depth_width import compare_with_best
from layerwright.recipes.shape import ShapeReport
from layerwright.report.shape import render_shape, shape_charts, write_shape


def row(name: str, layers: int, quality: float | None, **more: Any) -> dict[str, Any]:
    return {
        "shape": name,
        "layers": layers,
        "dim": 8,
        "block_parameters": 1000,
        "flops_per_token": 2000,
        "latency_ms": 1.0 * layers,
        "relative_latency": 1.0 * layers,
        "tokens_per_second": 1e4,
        "activation_bytes": 4096,
        "quality": quality,
        "quality_spread": 0.1,
        "hc_ratio": 0.5,
        "token_cosine": 0.4,
        **more,
    }


@pytest.fixture
def report() -> ShapeReport:
    values = {"1x8 <b>": [1.0, 1.2], "2x8": [1.1, 1.31], "4x8": [2.0, 2.0]}
    rows = [row("1x8 <b>", 1, 1.1), row("2x8", 2, 1.2), row("4x8", 4, 2.0), row("8x8", 8, None)]
    runs = [
        {"shape": name, "seed": seed, "failed": False, "quality": value}
        for name, own in values.items()
        for seed, value in enumerate(own)
    ]
    runs += [{"shape": "8x8", "seed": 0, "failed": True}]
    ranking = compare_with_best(values, higher_is_better=False)
    settings = {"params": 1e6, "task": "lm", "seeds": 2}
    return ShapeReport(settings, "bits/byte", False, rows, ranking, "1x8 <b>", runs, 1.0, 2.0)


def test_charts_hold_the_numbers(report: ShapeReport) -> None:
    quality, cost, smoothing = shape_charts(report)
    assert quality.traces[0]["x"] == [1, 1, 2, 2, 4, 4] and quality.traces[1]["y"] == [1.1, 1.2, 2.0]
    assert "Lower is better" in quality.about
    assert [cells[3] for cells in quality.rows] == ["best", "worse", "within noise"]
    assert cost.traces[0]["x"] == [1.0, 2.0, 4.0] and cost.rows[0][3] == "1.00 ms (1.00x)"
    assert smoothing.traces[0]["y"] == [0.5] * 3 and len(smoothing.rows) == 3


def test_page_is_escaped_and_offline(report: ShapeReport, tmp_path: Path) -> None:
    text = render_shape(report)
    assert "1x8 &lt;b&gt;" in text and "1x8 <b>" not in text
    assert "Best bits/byte: 1x8" in text and "Within noise of it: 4x8" in text
    figures = re.search(r'<script type="application/json" id="figures">(.*?)</script>', text, re.S)
    assert figures is not None and len(json.loads(figures[1])) == 3
    assert write_shape(report, tmp_path / "a.html").read_text() == text
