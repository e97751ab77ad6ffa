"""From the data of a job to one page that works offline."""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from layerwright.core.errors import InputError
from layerwright.report import html, numbers
from layerwright.report.charts import sensitivity_chart, stack_chart
from layerwright.report.frontier import frontier_chart
from layerwright.report.headline import comparison, headline
from layerwright.report.palette import Mark, palette
from layerwright.report.rows import Layer, layers_of

__all__ = ["render", "write_report"]

_MODELS = ("before", "after", "uniform")
_MAP_COLUMNS = 24
_FACTS = (
    "architecture",
    "budget",
    "calibration",
    "command",
    "heldout",
    "peak_memory_bytes",
    "plan",
    "recipe",
    "seconds",
    "seed",
    "target",
    "versions",
)


def render(data: Mapping[str, Any]) -> str:
    """The page as text: same data, same text.

    The page asks nothing of the network: styles, scripts and Plotly (about 5 MB) are inside, and its content security
    policy admits these scripts by their hashes and nothing else. All of `data` is escaped.

    Args:
        data: what `layerwright.recipes.optimize.report_data` returns. Missing parts are left out of the page.

    Raises:
        InputError: if `data` is no report: `layers` must be a list of mappings and `measured` a mapping of mappings.
    """
    _check(data)
    layers = layers_of(data["layers"])
    marks = palette(layer.label for layer in layers)
    measured = data["measured"]
    names = [name for name in (*_MODELS, *sorted(set(measured) - set(_MODELS))) if measured.get(name)]
    found = (stack_chart(layers, marks), sensitivity_chart(layers, marks), frontier_chart(data))
    charts = {chart.key: chart for chart in found if chart is not None}
    scripts = html.scripts("charts.js", "search.js")
    text: str = _template().render(
        data={name: data.get(name) for name in _FACTS},
        title=str(data.get("title") or "layerwright"),
        headline=headline(data),
        kinds=[row for row in data.get("kinds") or () if isinstance(row, Mapping) and "kind" in row],
        names=names,
        titles={"uniform": str(data.get("uniform") or "uniform")},
        comparison=comparison(measured, names) if names else (),
        layers=layers,
        grid=_grid(layers),
        marks=marks,
        shares=_shares(layers, marks),
        statuses=Counter(layer.status for layer in layers if layer.planned),
        failed=[layer for layer in layers if layer.status == "failed"],
        charts=charts,
        figures=html.embedded(list(charts.values()), legend=False),
        show=numbers,
        css=html.asset("page.css"),
        scripts=scripts,
        hashes=html.hashes(scripts),
    )
    return text


def write_report(out: str | Path) -> Path:
    """Write ``report.html`` from the ``report.json`` of the output folder `out`; returns its path.

    The page is written under a temporary name and renamed, so that a page that exists is complete.

    Raises:
        FileNotFoundError: if there is no ``report.json``.
        InputError: if it cannot be read as a report.
        CheckpointError: if the page cannot be written.
    """
    source = Path(out) / "report.json"
    advice = f"run `layerwright optimize MODEL --budget BUDGET -o {out}` first"
    if not source.is_file():
        raise FileNotFoundError(f"{source} does not exist: {advice}")
    try:
        data = json.loads(source.read_text(encoding="utf-8"))
        text = render(data)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{source} is not the report of a job ({reason}): {advice}") from error
    return html.write_page(source.with_name("report.html"), text)


def _check(data: Any) -> None:
    if not isinstance(data, Mapping):
        raise InputError(f"report: got {type(data).__name__}, expected a mapping")
    rows, measured = data.get("layers"), data.get("measured")
    if not isinstance(rows, list | tuple) or not all(isinstance(row, Mapping) for row in rows):
        raise InputError("report: `layers` is missing or is not a list of mappings")
    if not isinstance(measured, Mapping) or not all(isinstance(m, Mapping | None) for m in measured.values()):
        raise InputError("report: `measured` is missing or is not a mapping of mappings")
    if not isinstance(data.get("versions"), Mapping | None):
        raise InputError("report: `versions` is not a mapping")


def _grid(layers: Sequence[Layer]) -> dict[str, Any]:
    """Blocks down, places within a block across; empty where blocks are few or their parts are too many to read."""
    planned = [layer for layer in layers if layer.planned and layer.group and not layer.container]
    columns = list(dict.fromkeys(layer.name for layer in planned if not layer.dropped or layer.sensitivity is not None))
    groups: dict[str, dict[str, Layer]] = {}
    for layer in planned:
        groups.setdefault(layer.group, {})[layer.name] = layer
    readable = len(groups) > 1 and 0 < len(columns) <= _MAP_COLUMNS
    return {"columns": columns, "groups": groups} if readable else {}


def _shares(layers: Sequence[Layer], marks: Mapping[str, Mark]) -> list[tuple[str, int, str]]:
    """For the legend: label, how many layers have it, and their bytes afterwards."""
    leaves = [layer for layer in layers if not layer.container]
    rows = []
    for label in marks:
        own = [layer for layer in leaves if layer.label == label]
        if own:
            rows.append((label, len(own), numbers.size(sum(layer.after for layer in own))))
    return rows


@functools.cache
def _template() -> Any:
    return html.template("page.html.jinja")
