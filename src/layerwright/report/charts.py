"""The charts, as Plotly figures in plain data, each with the table of its numbers.

Figures are built without importing Plotly: they are JSON that Plotly's script draws in the browser. Colours of text and
grid are left to the page, which knows whether it is dark.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from layerwright.report import numbers
from layerwright.report.palette import Mark
from layerwright.report.rows import Layer, visible

__all__ = ["Chart", "log_axis", "sensitivity_chart", "stack_chart"]

_ROW_PIXELS = 17
_OUTLINE = {"width": 1, "color": "#6b7280"}


@dataclass(frozen=True)
class Chart:
    """A figure and its numbers.

    Attributes:
        key: id of its element in the page.
        title, about: heading, and the sentence that says how to read it.
        traces, layout: what Plotly draws.
        height: in CSS pixels.
        columns, rows: the table with the same numbers.
    """

    key: str
    title: str
    about: str
    traces: tuple[Mapping[str, Any], ...]
    layout: Mapping[str, Any]
    height: int
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def stack_chart(layers: Sequence[Layer], marks: Mapping[str, Mark]) -> Chart | None:
    """Bytes of every layer before (pale) and after (coloured by treatment), from input to output, by block."""
    shown, hidden = visible(layers)
    if not shown:
        return None
    ticks: list[str] = []
    places: list[int] = []
    group = ""
    for layer in shown:
        if layer.group != group:
            group = layer.group
            if group:
                ticks.append(f"<b>{escape(_short(group))}{', dropped' if layer.dropped else ''}</b>")
        places.append(len(ticks))
        ticks.append(escape(_short(layer.name)))
    traces: list[dict[str, Any]] = [
        {
            **_bars("before", [(place, layer, layer.before) for place, layer in zip(places, shown, strict=True)]),
            "marker": {"color": "rgba(128,128,128,0.16)", "line": {"width": 1, "color": "rgba(128,128,128,0.55)"}},
        }
    ]
    for label, mark in marks.items():
        bars = [(place, x, x.after) for place, x in zip(places, shown, strict=True) if x.label == label]
        if bars:
            pattern = {"shape": mark.pattern, "solidity": 0.35}
            traces.append({**_bars(label, bars), "marker": {"color": mark.colour, "pattern": pattern}})
    about = "Every layer from input to output. Pale: bytes before. Coloured: bytes after, by treatment."
    if any(layer.dropped for layer in shown):
        about += " Layers of dropped blocks keep only their pale bar."
    if hidden:
        about += f" {hidden} small layers, each below 1 % of the largest, are only in the table of decisions."
    height = 60 + _ROW_PIXELS * len(ticks)
    return Chart(
        "stack",
        "The stack of layers",
        about,
        tuple(traces),
        {
            "barmode": "overlay",
            "bargap": 0.15,
            "dragmode": False,
            "height": height,
            "margin": {"l": 8, "r": 16, "t": 48, "b": 8},
            "xaxis": {"title": {"text": "bytes"}, "side": "top", "tickformat": "~s", "fixedrange": True, "nticks": 6},
            "yaxis": {
                "tickvals": list(range(len(ticks))),
                "ticktext": ticks,
                "range": [len(ticks) - 0.4, -0.6],
                "automargin": True,
                "fixedrange": True,
                "showgrid": False,
                "zeroline": False,
                "tickfont": {"size": 11},
            },
        },
        height,
        ("layer", "block", "treatment", "before", "after", "ratio"),
        tuple(
            (x.path, x.group, x.label, numbers.size(x.before), numbers.size(x.after), numbers.ratio(x.after, x.before))
            for x in shown
        ),
    )


def sensitivity_chart(layers: Sequence[Layer], marks: Mapping[str, Mark]) -> Chart | None:
    """How much a layer hurts when it is squeezed as far as possible, against how much it costs."""
    known = [layer for layer in layers if layer.sensitivity is not None and layer.before > 0]
    if not known:
        return None
    drawn = [layer for layer in known if (layer.sensitivity or 0.0) > 0]
    traces = []
    for label, mark in marks.items():
        points = [layer for layer in drawn if layer.label == label]
        if points:
            traces.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "name": escape(label),
                    "x": [p.before for p in points],
                    "y": [p.sensitivity for p in points],
                    "hovertext": [_hover(p, f"sensitivity {numbers.number(p.sensitivity, 3)}") for p in points],
                    "hoverinfo": "text",
                    "marker": {
                        "color": mark.colour,
                        "symbol": mark.symbol,
                        "size": 10,
                        "line": _OUTLINE,
                        "opacity": 0.85,
                    },
                }
            )
    about = "Sensitivity is the predicted rise of the loss when a layer alone gets its smallest candidate. Layers on "
    about += "the upper left are cheap to spare and dear to squeeze; layers on the lower right are the reverse."
    if len(drawn) < len(known):
        about += (
            f" {len(known) - len(drawn)} layers without a rise do not fit on the logarithmic axis; see the numbers."
        )
    return Chart(
        "sensitivity",
        "Sensitivity against cost",
        about,
        tuple(traces),
        {
            "margin": {"l": 8, "r": 16, "t": 12, "b": 8},
            "xaxis": {"title": {"text": "bytes before"}, **_bytes_axis([p.before for p in drawn])},
            "yaxis": {"title": {"text": "sensitivity"}, **log_axis()},
            "hovermode": "closest",
        },
        420,
        ("layer", "treatment", "bytes before", "sensitivity"),
        tuple((x.path, x.label, numbers.size(x.before), numbers.number(x.sensitivity, 3)) for x in known),
    )


def _bars(name: str, bars: Sequence[tuple[int, Layer, float]]) -> dict[str, Any]:
    return {
        "type": "bar",
        "orientation": "h",
        "name": escape(name),
        "y": [place for place, _, _ in bars],
        "x": [value for _, _, value in bars],
        "hovertext": [_hover(x, f"{numbers.size(x.before)} to {numbers.size(x.after)}") for _, x, _ in bars],
        "hoverinfo": "text",
    }


def _hover(layer: Layer, words: str) -> str:
    """Plotly reads a few HTML tags in its texts, so names are escaped here as well."""
    return f"{escape(layer.path)}<br>{escape(layer.label)}<br>{escape(words)}"


def _short(name: str, most: int = 26) -> str:
    """The end of a long name: that is where names of layers differ."""
    return name if len(name) <= most else "…" + name[-most + 1 :]


def log_axis() -> dict[str, Any]:
    """Settings of a logarithmic axis with a tick at every power of ten."""
    return {"type": "log", "automargin": True, "exponentformat": "power", "dtick": 1}


def _bytes_axis(values: Sequence[float]) -> dict[str, Any]:
    """Logarithmic with a tick at every size that occurs, where these are few; layers come in few sizes."""
    sizes = sorted(set(values))
    axis: dict[str, Any] = {"type": "log", "automargin": True, "tickformat": "~s"}
    if sizes and len(sizes) <= 6 and all(b / a > 1.4 for a, b in itertools.pairwise(sizes)):
        axis |= {"tickvals": sizes, "ticktext": [numbers.size(value) for value in sizes]}
    return axis
