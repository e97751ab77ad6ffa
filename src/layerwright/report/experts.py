"""How a mixture of adapters uses its experts, as one page that works offline."""

from __future__ import annotations

from html import escape
from pathlib import Path

from layerwright.core.errors import InputError
from layerwright.explain.expert_usage import UsageTable
from layerwright.report import html, numbers
from layerwright.report.charts import Chart

__all__ = ["active_chart", "render_expert_usage", "usage_chart", "write_expert_usage"]

_MARGIN = {"l": 8, "r": 16, "t": 24, "b": 40}


def usage_chart(usage: UsageTable) -> Chart:
    """Share of the tokens that each expert serves, layers down, experts across."""
    layers, experts = list(usage.layers), max(len(item.shares) for item in usage.layers.values())
    names = [str(number) for number in range(experts)]
    grid = [[round(share, 6) for share in item.shares] for item in usage.layers.values()]
    trace = {
        "type": "heatmap",
        "x": names,
        "y": [escape(path) for path in layers],
        "z": [row + [None] * (experts - len(row)) for row in grid],
        "zmin": 0,
        "zmax": 1,
        "colorscale": "Viridis",
        "hovertemplate": "%{y}<br>expert %{x}: %{z:.3f} of the tokens<extra></extra>",
    }
    layout = {
        "xaxis": {"title": {"text": "expert"}, "type": "category"},
        "yaxis": {"automargin": True, "autorange": "reversed", "type": "category"},
        "margin": _MARGIN,
    }
    return Chart(
        "experts",
        "Share of the tokens that each expert serves",
        "Layers from input to output. A token can have several experts, so that a row need not sum to one.",
        (trace,),
        layout,
        120 + 20 * len(layers),
        ("layer", *(f"expert {name}" for name in names)),
        tuple((path, *(numbers.percent(share) for share in item.shares)) for path, item in usage.layers.items()),
    )


def active_chart(usage: UsageTable) -> Chart:
    """How many experts serve a token, on average and as a spread, by layer."""
    layers = list(usage.layers.items())
    trace = {
        "type": "scatter",
        "mode": "lines+markers",
        "x": [escape(path) for path, _ in layers],
        "y": [round(item.mean_active, 6) for _, item in layers],
        "error_y": {"type": "data", "array": [round(item.std_active, 6) for _, item in layers], "visible": True},
        "marker": {"color": "#0072B2"},
    }
    return Chart(
        "active",
        "Experts of a token",
        "Mean over the tokens; the bars are one standard deviation.",
        (trace,),
        {
            "xaxis": {"automargin": True, "type": "category"},
            "yaxis": {"title": {"text": "experts"}, "rangemode": "tozero"},
            "margin": _MARGIN,
        },
        420,
        ("layer", "mean", "standard deviation", "tokens without an expert"),
        tuple(
            (
                path,
                numbers.number(item.mean_active, 3),
                numbers.number(item.std_active, 3),
                numbers.percent(item.active[0]),
            )
            for path, item in layers
        ),
    )


def render_expert_usage(usage: UsageTable) -> str:
    """The page as text: same data, same text; everything in it is escaped, and it asks nothing of the network.

    Raises:
        InputError: no layer was used.
    """
    if not usage.layers:
        raise InputError("usage: holds no layers; count with expert_usage(model, data) first")
    charts = (usage_chart(usage), active_chart(usage))
    tokens = next(iter(usage.layers.values())).tokens
    return html.charts_page(
        f"Experts of the adapter {usage.adapter}",
        f"{len(usage.layers)} layers, {tokens} tokens, {usage.mean_active:.2f} experts for a token on average.",
        charts,
    )


def write_expert_usage(usage: UsageTable, page: str | Path) -> Path:
    """Write the page `page`, under a temporary name that is then renamed; returns its path.

    Raises:
        InputError: no layer was used.
        CheckpointError: it cannot be written.
    """
    return html.write_page(Path(page), render_expert_usage(usage))
