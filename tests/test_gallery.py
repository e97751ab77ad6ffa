"""Every page of the gallery has its picture, its formula, its cost, advice, and lines that run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(p for p in (ROOT / "docs" / "layers").glob("*.md") if p.stem not in ("index", "measured", "sizes"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_is_whole_and_its_lines_run(page: Path) -> None:
    text = page.read_text()
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert pictures and all((page.parent / path).is_file() for path in pictures)
    for part in ("Formula", "Cost", "When to use"):
        assert f"**{part}**" in text, part
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert blocks and len(blocks[0].strip().splitlines()) <= 10
    for block in blocks:
        exec(compile(block, str(page), "exec"), {"__name__": "gallery"})


def test_every_page_is_listed() -> None:
    index = (ROOT / "docs" / "layers" / "index.md").read_text()
    menu = (ROOT / "mkdocs.yml").read_text()
    for page in PAGES:
        assert f"]({page.name})" in index, page.name
        assert f"layers/{page.name}" in menu, page.name
