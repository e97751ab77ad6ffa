"""The chart of loss against size: what was predicted, what uniform treatment would give, what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from layerwright.report import numbers
from layerwright.report.charts import Chart, log_axis
from layerwright.report.numbers import finite
from layerwright.report.palette import NEUTRAL

__all__ = ["frontier_chart"]

_DECADES = 3


@dataclass(frozen=True)
class _Point:
    """One place of the chart; `bounds` only where it was measured."""

    bytes: float
    rise: float
    bounds: tuple[float, float] | None = None


@dataclass(frozen=True)
class _Series:
    name: str
    points: tuple[_Point, ...]
    colour: str
    symbol: str
    dash: str | None = None


def frontier_chart(data: Mapping[str, Any]) -> Chart | None:
    """Predicted rise of the loss against size, per layer and uniform, with the measured models; None without points.

    The axis is logarithmic unless something measured has not lost anything (zero and less have no logarithm).
    """
    series = [line for line in (*_curves(data), *_measurements(data)) if line.points]
    points = [point for line in series for point in line.points]
    if not points:
        return None
    measured = [point for line in series if line.dash is None for point in line.points]
    logarithmic = max(p.rise for p in points) > 0 and all(_lowest(p) > 0 for p in measured)
    limit = finite((data.get("limits") or {}).get("bytes"))
    xaxis: dict[str, Any] = {"title": {"text": "bytes"}, "tickformat": "~s", "automargin": True, "nticks": 8}
    yaxis: dict[str, Any] = {"title": {"text": "rise of the loss"}, "automargin": True}
    if logarithmic:
        xaxis |= {"range": _window(points)[0]}
        yaxis |= {**log_axis(), "range": _window(points)[1]}
    return Chart(
        "frontier",
        "Loss against size",
        _about(limit is not None, logarithmic),
        tuple(trace for line in series if (trace := _trace(line, logarithmic))),
        {
            "margin": {"l": 8, "r": 16, "t": 12, "b": 8},
            "xaxis": xaxis,
            "yaxis": yaxis,
            "hovermode": "closest",
            "showlegend": True,
            "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
            "shapes": [] if limit is None else [_limit_line(limit)],
        },
        460,
        ("what", "bytes", "rise of the loss", "95 % interval"),
        tuple(
            (line.name, numbers.size(p.bytes), numbers.number(p.rise, 3), numbers.interval(p.bounds, 3))
            for line in series
            for p in line.points
        ),
    )


def _curves(data: Mapping[str, Any]) -> tuple[_Series, _Series]:
    return (
        _Series("chosen per layer, predicted", _read(data.get("pareto")), "#0072B2", "circle", "solid"),
        _Series("uniform, predicted", _read(data.get("uniform_curve")), "#E69F00", "square", "dash"),
    )


def _read(curve: Any) -> tuple[_Point, ...]:
    pairs = [(finite(p.get("bytes")), finite(p.get("damage"))) for p in curve or ()]
    return tuple(_Point(place, rise) for place, rise in pairs if place is not None and rise is not None)


def _measurements(data: Mapping[str, Any]) -> list[_Series]:
    """Models with a difference to the first; in the colour of the curve that predicted them."""
    names = {"after": "this plan", "uniform": str(data.get("uniform") or "uniform")}
    looks = {"after": ("#0072B2", "star"), "uniform": ("#E69F00", "diamond")}
    series = []
    for key, name in names.items():
        figures = (data.get("measured") or {}).get(key) or {}
        place, rise = finite(figures.get("bytes")), finite(figures.get("difference"))
        if place is not None and rise is not None:
            point = _Point(place, rise, numbers.bounds_of(figures.get("difference_interval")))
            series.append(_Series(f"{name}, measured", (point,), *looks[key]))
    return series


def _lowest(point: _Point) -> float:
    return point.rise if point.bounds is None else min(point.rise, point.bounds[0])


def _window(points: Sequence[_Point]) -> tuple[list[float], list[float]]:
    """First view: the upper decades of the loss and the sizes that reach into them."""
    top = max(max(p.rise, p.bounds[1] if p.bounds else p.rise) for p in points)
    floor = max(min(p.rise for p in points if p.rise > 0), top / 10**_DECADES)
    places = [p.bytes for p in points if p.rise >= floor]
    margin = 0.05 * (max(places) - min(places)) or 0.05 * max(places)
    return [min(places) - margin, max(places) + margin], [math.log10(floor) - 0.15, math.log10(top) + 0.15]


def _trace(line: _Series, logarithmic: bool) -> dict[str, Any] | None:
    """One Plotly trace; the untouched model, which loses nothing, has no place on a logarithmic axis."""
    points = [p for p in line.points if p.rise > 0 or not logarithmic]
    if not points:
        return None
    name = escape(line.name)
    trace: dict[str, Any] = {
        "type": "scatter",
        "mode": "lines+markers" if line.dash else "markers",
        "name": name,
        "x": [p.bytes for p in points],
        "y": [p.rise for p in points],
        "hovertext": [f"{name}<br>{numbers.size(p.bytes)}<br>{_words(p)}" for p in points],
        "hoverinfo": "text",
        "marker": {"color": line.colour, "symbol": line.symbol, "size": 6 if line.dash else 11},
    }
    if line.dash:
        return trace | {"line": {"color": line.colour, "dash": line.dash}}
    trace["marker"]["line"] = {"width": 1.5, "color": "#6b7280"}
    if all(p.bounds for p in points):
        up = [max(p.bounds[1] - p.rise, 0.0) for p in points if p.bounds]
        down = [max(p.rise - p.bounds[0], 0.0) for p in points if p.bounds]
        bar = {"type": "data", "symmetric": False, "array": up, "arrayminus": down}
        trace["error_y"] = bar | {"color": line.colour, "thickness": 2, "width": 6}
    return trace


def _words(point: _Point) -> str:
    text = f"rise {numbers.number(point.rise, 3)}"
    return text if point.bounds is None else f"{text} ({numbers.interval(point.bounds, 3)})"


def _about(limit: bool, logarithmic: bool) -> str:
    text = (
        "Lower left is better. Lines are predictions from the scores of single layers on the calibration data; marks "
    )
    text += "with bars are measurements on held-out data with their 95 % intervals."
    text += " The dotted line is the budget." if limit else ""
    return text + (
        f" The view starts with the upper {_DECADES} decades; double-click shows all." if logarithmic else ""
    )


def _limit_line(limit: float) -> dict[str, Any]:
    line = {"color": NEUTRAL, "dash": "dot", "width": 2}
    return {"type": "line", "xref": "x", "yref": "paper", "x0": limit, "x1": limit, "y0": 0, "y1": 1, "line": line}
