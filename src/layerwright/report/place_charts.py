"""Charts of a placement: roofline, time by layer, time between tokens, throughput; Plotly figures in plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from layerwright.report import numbers
from layerwright.report.charts import Chart, log_axis
from layerwright.report.palette import palette

__all__ = ["latency_chart", "place_charts", "processor_chart", "roofline_chart", "share_chart", "throughput_chart"]

_LEGEND = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}
_MARGIN = {"l": 8, "r": 16, "t": 72, "b": 8}
_SYMBOLS = {"decode": "circle", "mixed": "diamond", "prefill": "square"}
_LINES = ("solid", "dash", "dot", "dashdot", "longdash")


def place_charts(data: Mapping[str, Any]) -> tuple[Chart, ...]:
    """All charts of the data of `layerwright.recipes.place.PlaceResult`."""
    return (roofline_chart(data), processor_chart(data), throughput_chart(data), latency_chart(data), share_chart(data))


def roofline_chart(data: Mapping[str, Any]) -> Chart:
    """Operations per second against operations per byte: the roofs, and every kind of layer below one of them."""
    kinds = [kind for kind in data["kinds"] if kind["op_per_byte"] > 0]
    lowest = min((kind["op_per_byte"] for kind in kinds), default=1.0) / 2
    highest = max((kind["op_per_byte"] for kind in kinds), default=1.0) * 2
    traces: list[dict[str, Any]] = []
    for number, side in enumerate(side for side in ("high", "low") if data["device"].get(side)):
        found = data["device"][side]
        share, flops, bandwidth = found["efficiency"], found["flops"], found["bandwidth"]
        places = sorted({lowest, min(max(flops / bandwidth, lowest), highest), highest})
        roof = [min(flops, place * bandwidth) * share for place in places]
        line = {"dash": _LINES[number], "width": 2}
        name = escape(str(found["name"]))
        traces.append({"type": "scatter", "mode": "lines", "name": name, "x": places, "y": roof, "line": line})
    marks = palette(kind["kind"] for kind in kinds)
    rows = []
    for kind in kinds:
        time = _time(kind)
        rate = kind["flops"] / time if time else 0.0
        rows.append(
            (
                kind["stage"],
                kind["kind"],
                numbers.number(kind["op_per_byte"], 3),
                numbers.count(rate, "FLOP/s"),
                kind["processor"],
            )
        )
        words = (
            f"{kind['kind']}, {kind['stage']}<br>{numbers.number(kind['op_per_byte'], 3)} Op/B on {kind['processor']}"
        )
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": escape(f"{kind['kind']}, {kind['stage']}"),
                "x": [kind["op_per_byte"]],
                "y": [rate],
                "hovertext": [words],
                "hoverinfo": "text",
                "showlegend": kind["stage"] == "decode" or kind["kind"] == "attention.prefill",
                "marker": {
                    "color": marks[kind["kind"]].colour,
                    "symbol": _SYMBOLS[kind["stage"]] + ("-open" if marks[kind["kind"]].pattern else ""),
                    "size": 11,
                    "line": {"width": 2, "color": marks[kind["kind"]].colour},
                },
            }
        )
    return Chart(
        "roofline",
        "Operations per byte of every kind of layer",
        "Lines are what each processor can reach. Circles are a stage in which all requests decode, diamonds one with a "
        "prefill among them, squares a prefill alone; each stands where the processor that runs it takes it.",
        tuple(traces),
        {
            "xaxis": {"title": {"text": "operations per byte"}, **log_axis()},
            "yaxis": {"title": {"text": "operations per second"}, **log_axis()},
            "legend": _LEGEND,
            "margin": {**_MARGIN, "t": 120},
        },
        560,
        ("stage", "layers", "Op/B", "reached", "runs on"),
        tuple(rows),
    )


def processor_chart(data: Mapping[str, Any]) -> Chart:
    """Milliseconds of every kind of layer on each processor, in a stage in which all requests decode."""
    kinds = [kind for kind in data["kinds"] if kind["stage"] == "decode"]
    names = [kind["kind"] for kind in kinds]
    colours = {"high": "#0072B2", "low": "#E69F00"}
    traces = [
        {
            "type": "bar",
            "name": escape(str(data["device"][side]["name"])),
            "x": names,
            "y": [kind[f"{side}_seconds"] * 1e3 for kind in kinds],
            "marker": {"color": colour},
        }
        for side, colour in colours.items()
        if data["device"].get(side)
    ]
    return Chart(
        "processors",
        "Time of every kind of layer on each processor",
        "A stage in which all requests decode, on one device, over all blocks.",
        tuple(traces),
        {
            "barmode": "group",
            "xaxis": {"automargin": True},
            "yaxis": {"title": {"text": "milliseconds"}, "automargin": True},
            "legend": _LEGEND,
            "margin": _MARGIN,
        },
        420,
        ("layers", "ms high", "ms low", "runs on"),
        tuple(
            (
                kind["kind"],
                numbers.milliseconds(kind["high_seconds"] * 1e3),
                numbers.milliseconds((kind["low_seconds"] or 0.0) * 1e3),
                kind["processor"],
            )
            for kind in kinds
        ),
    )


def throughput_chart(data: Mapping[str, Any]) -> Chart:
    """Tokens per second of every system."""
    systems = data["systems"]
    names = list(systems)
    marks = palette(names)
    return Chart(
        "throughput",
        "Throughput of the systems",
        "Tokens made per second of simulated time, for the same requests.",
        (
            {
                "type": "bar",
                "x": [escape(name) for name in names],
                "y": [systems[name]["throughput"] for name in names],
                "marker": {"color": [marks[name].colour for name in names]},
            },
        ),
        {
            "showlegend": False,
            "xaxis": {"automargin": True, "type": "category"},
            "yaxis": {"title": {"text": "tokens per second"}, "automargin": True},
            "margin": {**_MARGIN, "t": 16},
        },
        380,
        ("system", "tokens/s"),
        tuple((name, numbers.number(systems[name]["throughput"], 4)) for name in names),
    )


def latency_chart(data: Mapping[str, Any]) -> Chart:
    """The distribution of the time between tokens of every system."""
    systems = {name: report for name, report in data["systems"].items() if report["tbt"]["count"]}
    marks = palette(data["systems"])
    traces = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": escape(name),
            "x": [value * 1e3 for value in report["tbt"]["percentiles"]],
            "y": list(range(101)),
            "line": {"color": marks[name].colour, "dash": _LINES[number % len(_LINES)], "width": 2, "shape": "hv"},
        }
        for number, (name, report) in enumerate(systems.items())
    ]
    rows = [
        (name, *(numbers.milliseconds(report["tbt"]["percentiles"][place] * 1e3) for place in (50, 90, 99, 100)))
        for name, report in systems.items()
    ]
    return Chart(
        "tbt",
        "Time between tokens",
        "Share of the tokens that come within a time after the one before. The step to the right at the top is the stages "
        "with a prefill.",
        tuple(traces),
        {
            "xaxis": {"title": {"text": "milliseconds"}, "type": "log", "automargin": True, "tickformat": "~g"},
            "yaxis": {"title": {"text": "percent of tokens"}, "range": [0, 101], "automargin": True},
            "legend": _LEGEND,
            "margin": _MARGIN,
        },
        420,
        ("system", "median", "90 %", "99 %", "longest"),
        tuple(rows),
    )


def share_chart(data: Mapping[str, Any]) -> Chart:
    """Where the time of a token goes in every system."""
    systems = data["systems"]
    kinds = list(dict.fromkeys(kind for report in systems.values() for kind in report["time_by_layer"]))
    marks = palette(kinds)
    per_token: dict[str, dict[str, float]] = {
        name: {kind: report["time_by_layer"].get(kind, 0.0) / max(report["tokens"], 1) * 1e6 for kind in kinds}
        for name, report in systems.items()
    }
    names: Sequence[str] = list(systems)[::-1]
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "name": escape(kind),
            "y": [escape(name) for name in names],
            "x": [per_token[name][kind] for name in names],
            "marker": {"color": marks[kind].colour, "pattern": {"shape": marks[kind].pattern, "solidity": 0.35}},
        }
        for kind in kinds
    ]
    return Chart(
        "shares",
        "Where the time of a token goes",
        "Microseconds of a token by kind of layer, over all stages that were simulated.",
        tuple(traces),
        {
            "barmode": "stack",
            "xaxis": {"title": {"text": "microseconds per token"}, "automargin": True},
            "yaxis": {"automargin": True, "type": "category"},
            "legend": _LEGEND,
            "margin": {**_MARGIN, "t": 96},
        },
        180 + 48 * len(names),
        ("system", *kinds),
        tuple((name, *(numbers.number(per_token[name][kind], 3) for kind in kinds)) for name in systems),
    )


def _time(kind: Mapping[str, Any]) -> float:
    """Seconds where a layer runs; what both run stands at the faster of them."""
    high, low = float(kind["high_seconds"]), kind["low_seconds"]
    if kind["processor"] == "high" or low is None:
        return high
    return float(low) if kind["processor"] == "low" else min(high, float(low))
