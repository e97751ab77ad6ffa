"""What every page of a report is made of: assets inside the page, scripts admitted by their hashes, safe writing."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from layerwright.core.errors import CheckpointError
from layerwright.report.charts import Chart

__all__: list[str] = []


@functools.cache
def asset(name: str) -> str:
    """The text of a file in ``templates``."""
    return resources.files("layerwright.report").joinpath("templates", name).read_text(encoding="utf-8")


@functools.cache
def template(name: str) -> Any:
    """A page's template; everything that is put into it is escaped, and nothing may be missing."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(asset(name))


def scripts(*names: str) -> dict[str, str]:
    """Plotly and the named files, by name, in the order in which they run."""
    return {"plotly": _plotly(), **{name.removesuffix(".js"): asset(name) for name in names}}


def hashes(found: Mapping[str, str]) -> str:
    """The sources that a content security policy admits: these scripts and nothing else."""
    return " ".join(f"'sha256-{_digest(script)}'" for script in found.values())


def embedded(charts: Sequence[Chart], *, legend: bool = True) -> str:
    """JSON that is safe inside a script element: no ``<``, ``>``, ``&`` or line separators of JavaScript.

    Without `legend` a chart has one only if its own layout asks for it.
    """
    default: dict[str, Any] = {} if legend else {"showlegend": False}
    figures = [{"key": c.key, "data": c.traces, "layout": {**default, **c.layout}, "height": c.height} for c in charts]
    text = json.dumps(figures, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def charts_page(title: str, headline: str, charts: Sequence[Chart]) -> str:
    """A page of charts with their tables: same data, same text; everything in it is escaped, it asks nothing of the network."""
    found = scripts("charts.js")
    text: str = template("charts.html.jinja").render(
        title=title,
        headline=headline,
        charts=charts,
        figures=embedded(charts, legend=False),
        css=asset("page.css"),
        scripts=found,
        hashes=hashes(found),
    )
    return text


def write_page(page: Path, text: str) -> Path:
    """Write a page under a temporary name that is then renamed, so that a page that exists is complete.

    Raises:
        CheckpointError: it cannot be written.
    """
    temporary = page.with_name(page.name + ".tmp")
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(page)
    except OSError as error:
        if temporary.is_file():
            temporary.unlink()
        raise CheckpointError(
            f"{page} cannot be written ({error.strerror or error}): is the disk full or read-only?"
        ) from error
    return page


@functools.cache
def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


@functools.cache
def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
