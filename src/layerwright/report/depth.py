"""What each block does for a model's depth, as one page that works offline."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from layerwright.recipes.depth_profile import DepthProfile
from layerwright.report import html, numbers
from layerwright.report.charts import Chart

__all__ = ["depth_charts", "write_depth"]

_MARGIN = {"l": 56, "r": 16, "t": 24, "b": 56}
_ABOUT = {
    "variance": (
        "Variance of the residual stream after each block",
        "Where it grows without bound, what deep blocks add is small beside it.",
    ),
    "angle": (
        "Turn of the residual stream in each block",
        "Angle between input and output as a share of half a turn, mean over tokens.",
    ),
    "missed": ("Rise of the loss without each block", "Blocks that are not missed can go."),
    "gap": ("Distance of each block from the identity", "Relative size of J v - v for random directions v."),
}


def depth_charts(profiles: Sequence[DepthProfile]) -> tuple[Chart, ...]:
    """A chart for each measure, a line for each model."""
    charts = []
    for measure, (title, about) in _ABOUT.items():
        traces: list[dict[str, Any]] = []
        rows: list[tuple[str, ...]] = []
        for profile in profiles:
            values = [getattr(block, measure) for block in profile.blocks]
            if any(value is None for value in values):
                continue
            places = list(range(1, len(values) + 1))
            trace = {"type": "scatter", "mode": "lines+markers", "name": escape(profile.model), "x": places}
            traces.append({**trace, "y": [numbers.finite(value) for value in values]})
            rows += [
                (profile.model, block.block, f"{value:.4g}")
                for block, value in zip(profile.blocks, values, strict=True)
            ]
        if not traces:
            continue
        axis: dict[str, Any] = {"type": "log"} if measure == "variance" else {"rangemode": "tozero"}
        layout = {
            "xaxis": {"title": {"text": "block"}},
            "yaxis": axis,
            "margin": _MARGIN,
            "showlegend": len(traces) > 1,
        }
        charts.append(
            Chart(measure, title, about, tuple(traces), layout, 340, ("model", "block", measure), tuple(rows))
        )
    return tuple(charts)


def write_depth(profiles: Sequence[DepthProfile], page: str | Path) -> Path:
    """Write the page `page`, under a temporary name that is then renamed; returns its path.

    Raises:
        CheckpointError: it cannot be written.
    """
    names = ", ".join(profile.model for profile in profiles)
    headline = "; ".join(f"{profile.model}: {len(profile.blocks)} blocks" for profile in profiles)
    return html.write_page(Path(page), html.charts_page(f"Depth of {names}", headline, depth_charts(profiles)))
