"""One HTML page that shows what a job did: what changed, what it cost, and why every layer got what it got.

- `render`: the data of a job to the text of the page.
- `write_report`: ``report.json`` of an output folder to ``report.html`` beside it.
"""

from __future__ import annotations

from layerwright.report.page import render, write_report
from layerwright.report.shape import render_shape, shape_charts, write_shape

__all__ = [
    "render",
    "render_shape",
    "shape_charts",
    "write_report",
    "write_shape",
]
