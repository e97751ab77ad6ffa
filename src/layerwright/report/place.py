"""The page of `layerwright place`: one file that works offline."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layerwright.core.errors import InputError
from layerwright.report import html, numbers
from layerwright.report.place_charts import place_charts

__all__ = ["render_place", "write_place_report"]


def render_place(data: Mapping[str, Any]) -> str:
    """The page as text: same data, same text.

    It asks nothing of the network: styles, scripts and Plotly (about 5 MB) are inside, its content security policy admits
    those scripts by their hashes alone, and all of `data` is escaped.

    Args:
        data: of `layerwright.recipes.place.PlaceResult.to_data`.

    Raises:
        InputError: if `data` is no such result.
    """
    for key, kind in (("model", Mapping), ("device", Mapping), ("kinds", list), ("systems", Mapping)):
        if not isinstance(data.get(key), kind) or not data[key]:
            raise InputError(f"report: `{key}` is missing or empty: expected the results of `layerwright place`")
    charts = place_charts(data)
    scripts = html.scripts("charts.js")
    first = next(iter(data["systems"]))
    notes = [f"{name}: {line}" for name, report in data["systems"].items() for line in report["warnings"]]
    notes += [f"{name} was skipped: {reason}" for name, reason in data["skipped"].items()]
    text: str = _place_template().render(
        title=f"{data['model']['name']} on {data['device']['name']}",
        headline=_headline(data, first),
        setting=f"{data['devices']} devices, policy {data['policy']}; {data['load']['text']}.",
        warnings=notes,
        systems=_systems(data, first),
        charts=charts,
        figures=html.embedded(list(charts)),
        css=html.asset("page.css"),
        scripts=scripts,
        hashes=html.hashes(scripts),
    )
    return text


def write_place_report(data: Mapping[str, Any], out: str | Path) -> Path:
    """Write ``report.html`` into the folder `out`, under a temporary name that is then renamed; returns its path.

    Raises:
        InputError: `data` is no result of `layerwright place`.
        CheckpointError: the page cannot be written.
    """
    return html.write_page(Path(out) / "report.html", render_place(data))


def _headline(data: Mapping[str, Any], first: str) -> str:
    report = data["systems"][first]
    text = f"{data['model']['name']} on {first}: {numbers.number(report['throughput'], 3)} tokens/s"
    gains = [f"{numbers.ratio(gain, 1)} {name}" for name, gain in data["gains"].items()]
    return f"{text}, {', '.join(gains)}." if gains else f"{text}."


def _systems(data: Mapping[str, Any], first: str) -> dict[str, Any]:
    columns = (
        "system",
        "tokens/s",
        "TBT median",
        "TBT 99 %",
        "first token",
        "batch",
        "finished",
        f"{first} against it",
    )
    rows = []
    for name, report in data["systems"].items():
        tbt, first_token = report["tbt"]["percentiles"], report["t2ft"]["percentiles"]
        rows.append(
            (
                name,
                numbers.number(report["throughput"], 4),
                numbers.milliseconds(tbt[50] * 1e3) if tbt else numbers.MISSING,
                numbers.milliseconds(tbt[99] * 1e3) if tbt else numbers.MISSING,
                numbers.milliseconds(first_token[50] * 1e3) if first_token else numbers.MISSING,
                str(report["batch"]),
                str(report["completed"]),
                numbers.ratio(data["gains"].get(name), 1),
            )
        )
    return {"columns": columns, "rows": rows}


@functools.cache
def _place_template() -> Any:
    return html.template("place.html.jinja")
