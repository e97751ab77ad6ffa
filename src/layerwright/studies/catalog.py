"""The page of systems for the documentation: ``python -m layerwright.studies.catalog --write docs/systems.md``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from layerwright.studies.systems import SYSTEMS, markdown_table

__all__ = ["main", "systems_page"]


def systems_page() -> str:
    """The page ``docs/systems.md``."""
    parts = [
        "# Systems",
        "",
        "Each published system is here as working parts, in the rooms where they belong, and as a study that measures "
        "its claims on a small scale: `layerwright study SLUG`.",
        "",
        markdown_table(),
    ]
    for item in SYSTEMS:
        parts += [
            f"## {item.slug}",
            "",
            f"{item.title}. {item.authors}, {item.year}. [arXiv {item.arxiv}](https://arxiv.org/abs/{item.arxiv})",
            "",
            f"{item.idea}",
            "",
            f"- Rooms: {', '.join(f'`{room}`' for room in item.rooms)}",
            f"- Parts: {', '.join(f'`layerwright.{name}`' for name in item.objects)}",
            f"- Recipes: {', '.join(f'`{name}`' for name in item.recipes) or 'none'}",
            f"- Study: `layerwright study {item.slug}` (`--quick` takes seconds)",
            "",
        ]
    return "\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the page, or write it to a file."""
    parser = argparse.ArgumentParser(description="The page of systems, from the catalog.")
    parser.add_argument("--write", type=Path, help="file to write; printed if it is left out")
    target = parser.parse_args(arguments).write
    if target is None:
        print(systems_page(), end="")
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(systems_page())


if __name__ == "__main__":
    main()
