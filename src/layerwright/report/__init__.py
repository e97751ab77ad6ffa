"""One HTML page that shows what a job did: what changed, what it cost, and why every layer got what it got.

- `render`: the data of a job to the text of the page.
- `write_report`: ``report.json`` of an output folder to ``report.html`` beside it.
"""

from __future__ import annotations

from layerwright.report.page import render, write_report

__all__ = ["render", "write_report"]
