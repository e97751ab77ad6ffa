"""A fitted scaling law as one page that works offline: the runs, the law, and how sure it is beyond them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy

from layerwright.report import html, numbers
from layerwright.report.charts import Chart
from layerwright.theory.scaling import LawFit, Prediction, RunTable

__all__ = ["law_chart", "render_scaling", "residual_chart", "write_scaling"]

_MARGIN = {"l": 56, "r": 16, "t": 24, "b": 48}
_LABELS = {
    "n_params": "parameters without embeddings",
    "tokens": "tokens",
    "flops": "operations",
    "steps": "least steps",
}


def law_chart(fit: LawFit, table: RunTable, told: Prediction | None, inputs: Mapping[str, float] | None) -> Chart:
    """Losses of the runs over the law's first input, and the law's band along it, to ten times beyond the largest run.

    Of laws in two inputs each line holds the second one at a value that runs had.
    """
    names = fit.law.inputs
    columns = table.columns(names)
    first = numpy.geomspace(columns[0].min(), 10 * columns[0].max(), 40)
    held: list[Any] = [None] if len(names) == 1 else sorted(set(numpy.quantile(columns[1], [0, 0.5, 1]).tolist()))
    traces: list[dict[str, Any]] = []
    rows: list[tuple[str, ...]] = []
    colours = ("#0072B2", "#E69F00", "#009E73")
    for number, value in enumerate(held):
        logs = numpy.log(numpy.array([first] if value is None else [first, numpy.full_like(first, value)]))
        center = numpy.exp(fit.law.log_loss(fit.theta, logs))
        low, high = numpy.exp(numpy.quantile(fit.law.log_loss(fit.samples, logs), [0.025, 0.975], axis=0))
        name = "the law" if value is None else f"{numbers.count(value)} {_LABELS[names[1]]}"
        band = {"type": "scatter", "mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False}
        x = [float(v) for v in first]
        traces += [
            {**band, "x": x, "y": [float(v) for v in low]},
            {**band, "x": x, "y": [float(v) for v in high], "fill": "tonexty", "fillcolor": f"{colours[number]}33"},
            {"type": "scatter", "mode": "lines", "x": x, "y": [float(v) for v in center], "name": name}
            | {"line": {"color": colours[number]}},
        ]
        rows += [
            (name, numbers.count(x[i]), f"{center[i]:.4f}", f"{low[i]:.4f} to {high[i]:.4f}") for i in range(0, 40, 13)
        ]
    points = {"type": "scatter", "mode": "markers", "name": "runs", "marker": {"color": "#6b7280"}}
    traces.append({**points, "x": columns[0].tolist(), "y": table.losses.tolist()})
    if told is not None and inputs is not None:
        error = {
            "type": "data",
            "symmetric": False,
            "array": [told.high - told.loss],
            "arrayminus": [told.loss - told.low],
        }
        traces.append(
            {"type": "scatter", "mode": "markers", "name": "asked for", "x": [inputs[names[0]]], "y": [told.loss]}
            | {"error_y": error, "marker": {"color": "#D55E00", "size": 10}}
        )
        rows.append(
            ("asked for", numbers.count(inputs[names[0]]), f"{told.loss:.4f}", f"{told.low:.4f} to {told.high:.4f}")
        )
    layout = {
        "xaxis": {"type": "log", "title": {"text": _LABELS[names[0]]}},
        "yaxis": {"type": "log", "title": {"text": "loss"}},
        "margin": _MARGIN,
        "showlegend": True,
    }
    about = "Bands hold 95 % of the laws that fit resampled runs; right of the last run they say what is not known."
    return Chart(
        "law",
        "Losses and the law",
        about,
        tuple(traces),
        layout,
        460,
        ("", _LABELS[names[0]], "loss", "95 %"),
        tuple(rows),
    )


def residual_chart(fit: LawFit, table: RunTable) -> Chart:
    """By how much each run lies above or below the law."""
    values = [float(value) for value in numpy.expm1(fit.residuals)]
    x = table.columns(fit.law.inputs)[0].tolist()
    trace = {"type": "scatter", "mode": "markers", "x": x, "y": values, "marker": {"color": "#0072B2"}}
    layout = {
        "xaxis": {"type": "log", "title": {"text": _LABELS[fit.law.inputs[0]]}},
        "yaxis": {"tickformat": ".1%", "zeroline": True},
        "margin": _MARGIN,
    }
    rows = tuple((numbers.count(size), f"{value:+.2%}") for size, value in zip(x, values, strict=True))
    title, about = "Runs against the law", "A trend here says that the law has the wrong form."
    return Chart(
        "residuals", title, about, (trace,), layout, 320, (_LABELS[fit.law.inputs[0]], "loss over the law"), rows
    )


def render_scaling(
    fit: LawFit, table: RunTable, *, told: Prediction | None = None, inputs: Mapping[str, float] | None = None
) -> str:
    """The page as text: same fit, same text; it asks nothing of the network."""
    charts = (law_chart(fit, table, told, inputs), residual_chart(fit, table))
    exponents = ", ".join(
        f"{name} = {value:.4f} [{fit.interval(name)[0]:.4f}, {fit.interval(name)[1]:.4f}]"
        for name, value in fit.params.items()
        if name.startswith("alpha") or name == "L_inf"
    )
    state = "" if fit.identified else f" Not identified: {'; '.join(fit.reasons)}."
    headline = f"{len(table)} runs: {exponents}; a run deviates by {fit.noise:.2%}.{state}"
    return html.charts_page(f"Scaling law {fit.law.name}", headline, charts)


def write_scaling(
    fit: LawFit,
    table: RunTable,
    page: str | Path,
    *,
    told: Prediction | None = None,
    inputs: Mapping[str, float] | None = None,
) -> Path:
    """Write the page `page`, under a temporary name that is then renamed; returns its path.

    Raises:
        CheckpointError: it cannot be written.
    """
    return html.write_page(Path(page), render_scaling(fit, table, told=told, inputs=inputs))
