"""A comparison of shapes as one page that works offline: quality over depth, quality against time, smoothing over depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from layerwright.recipes.shape import ShapeReport
from layerwright.report import html, numbers
from layerwright.report.charts import Chart

__all__ = ["render_shape", "shape_charts", "write_shape"]

_MARGIN = {"l": 64, "r": 16, "t": 24, "b": 56}


def shape_charts(report: ShapeReport) -> tuple[Chart, ...]:
    """Quality by depth with every seed, quality against latency, and what is left of differences between tokens."""
    rows = [row for row in report.rows if row["quality"] is not None]
    return (_quality(report, rows), _cost(report, rows), _smoothing(rows))


def _quality(report: ShapeReport, rows: Sequence[Mapping[str, Any]]) -> Chart:
    depth = {row["shape"]: row["layers"] for row in rows}
    runs = [run for run in report.runs if not run["failed"] and run["shape"] in depth]
    points = {
        "type": "scatter",
        "mode": "markers",
        "name": "a seed",
        "x": [depth[run["shape"]] for run in runs],
        "y": [numbers.finite(run["quality"]) for run in runs],
        "marker": {"color": "#9ca3af"},
    }
    means = _trace("mean", rows, "layers", "quality")
    places = {row.name: row for row in report.ranking}
    table = tuple(
        (
            row["shape"],
            numbers.number(row["quality"]),
            numbers.number(row["quality_spread"]),
            _state(places, row["shape"]),
        )
        for row in rows
    )
    better = "higher" if report.higher_is_better else "lower"
    return Chart(
        "quality",
        f"{report.quality} by depth",
        f"{better.capitalize()} is better. All shapes saw the same batches in the same order; grey: each seed.",
        (points, means),
        _layout("layers", report.quality, log=True),
        380,
        ("shape", report.quality, "deviation over seeds", "against the best"),
        table,
    )


def _cost(report: ShapeReport, rows: Sequence[Mapping[str, Any]]) -> Chart:
    trace = _trace("shapes", rows, "latency_ms", "quality", mode="markers+text")
    trace |= {"text": [escape(f"{row['layers']}x{row['dim']}") for row in rows], "textposition": "top center"}
    table = tuple(
        (
            row["shape"],
            numbers.count(row["block_parameters"]),
            numbers.count(row["flops_per_token"], "FLOP"),
            f"{numbers.milliseconds(row['latency_ms'])} ({row['relative_latency']:.2f}x)",
            numbers.count(row["tokens_per_second"]),
            numbers.size(row["activation_bytes"]),
        )
        for row in rows
    )
    return Chart(
        "cost",
        "Quality against latency",
        "Of one sample; deep and narrow shapes call more and smaller products one after the other.",
        (trace,),
        _layout("ms", report.quality),
        380,
        ("shape", "block parameters", "operations a token", "latency", "tokens/s", "activations of a step"),
        table,
    )


def _smoothing(rows: Sequence[Mapping[str, Any]]) -> Chart:
    traces = (
        _trace("share of differences (hc)", rows, "layers", "hc_ratio"),
        _trace("mean cosine of tokens", rows, "layers", "token_cosine"),
    )
    table = tuple((row["shape"], numbers.number(row["hc_ratio"]), numbers.number(row["token_cosine"])) for row in rows)
    return Chart(
        "smoothing",
        "How alike tokens are after the last block",
        "Share near 0 and cosine near 1: tokens have become one (over-smoothing).",
        traces,
        {**_layout("layers", "", log=True), "showlegend": True},
        340,
        ("shape", "share of differences", "cosine"),
        table,
    )


def _trace(name: str, rows: Sequence[Mapping[str, Any]], x: str, y: str, mode: str = "lines+markers") -> dict[str, Any]:
    values = [numbers.finite(row[y]) for row in rows]
    return {"type": "scatter", "mode": mode, "name": name, "x": [row[x] for row in rows], "y": values}


def _layout(x: str, y: str, *, log: bool = False) -> dict[str, Any]:
    axis: dict[str, Any] = {"title": {"text": escape(x)}} | ({"type": "log"} if log else {"rangemode": "tozero"})
    return {"xaxis": axis, "yaxis": {"title": {"text": escape(y)}}, "margin": _MARGIN}


def _state(places: Mapping[str, Any], name: str) -> str:
    row = places.get(name)
    if row is None:
        return "failed for a seed"
    if row.worse == 0:
        return "best"
    return {True: "within noise", False: "worse", None: "worse, noise not known"}[row.within_noise]


def render_shape(report: ShapeReport) -> str:
    """The page as text: same report, same text; it asks nothing of the network."""
    near = [row.name for row in report.ranking if row.within_noise and row.worse > 0]
    more = f" Within noise of it: {'; '.join(near)}." if near else ""
    count = report.settings["params"]
    headline = f"Best {report.quality}: {report.best}.{more} Fastest of these: {report.fastest}."
    title = f"Shapes of {numbers.count(count)} parameters, task {report.settings['task']}"
    return html.charts_page(title, headline, shape_charts(report))


def write_shape(report: ShapeReport, page: str | Path) -> Path:
    """Write the page `page`, under a temporary name that is then renamed; returns its path.

    Raises:
        CheckpointError: it cannot be written.
    """
    return html.write_page(Path(page), render_shape(report))
