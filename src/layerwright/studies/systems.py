"""The published systems whose parts this package holds, and the last verdict of each study."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from importlib import import_module, resources
from pathlib import Path
from typing import Any

import yaml

from layerwright.core.errors import InputError, unknown_name
from layerwright.core.evidence import Evidence

__all__ = [
    "SYSTEMS",
    "System",
    "list_systems",
    "markdown_table",
    "resolve",
    "save_verdict",
    "system",
    "verdicts_file",
]


@dataclass(frozen=True)
class System:
    """One published system.

    Attributes:
        slug: its name in commands; the study is ``layerwright.studies.<slug with underscores>``.
        title: of the paper.
        authors: first author, or all of few.
        year: of the first version.
        arxiv: identifier.
        idea: one sentence.
        rooms: where its parts live.
        objects: public objects, as dotted names below ``layerwright``.
        recipes: names of its recipes.
        verdict: of the last run of its study on this machine, or ``not run``.
    """

    slug: str
    title: str
    authors: str
    year: int
    arxiv: str
    idea: str
    rooms: tuple[str, ...]
    objects: tuple[str, ...]
    recipes: tuple[str, ...] = ()
    verdict: str = "not run"

    @property
    def paper(self) -> str:
        """``Authors (year), arXiv 1234.56789``."""
        return f"{self.authors} ({self.year}), arXiv {self.arxiv}"

    def to_data(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "slug": self.slug,
            "title": self.title,
            "paper": self.paper,
            "authors": self.authors,
            "year": self.year,
            "arxiv": self.arxiv,
            "idea": self.idea,
            "rooms": list(self.rooms),
            "objects": list(self.objects),
            "recipes": list(self.recipes),
            "verdict": self.verdict,
        }


def _read() -> tuple[System, ...]:
    rows = yaml.safe_load(resources.files("layerwright.studies").joinpath("systems.yaml").read_text(encoding="utf-8"))
    lists = ("rooms", "objects", "recipes")
    return tuple(System(**row | {name: tuple(row.get(name, ())) for name in lists}) for row in rows)


SYSTEMS: tuple[System, ...] = _read()
"""All systems of ``systems.yaml``, by slug in alphabetical order."""


def system(slug: str) -> System:
    """The entry of that slug; dashes and underscores count alike.

    Raises:
        InputError: unknown; close matches are listed.
    """
    found = {item.slug: item for item in SYSTEMS}
    if slug.replace("_", "-") not in found:
        raise unknown_name("study", slug, found)
    return found[slug.replace("_", "-")]


def list_systems() -> tuple[System, ...]:
    """Every system, with the verdict of the last run of its study."""
    verdicts = read_verdicts()
    return tuple(replace(item, verdict=verdicts.get(item.slug, {}).get("verdict", "not run")) for item in SYSTEMS)


def resolve(name: str) -> Any:
    """The object of that dotted name below ``layerwright``.

    Raises:
        InputError: there is none.
    """
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(import_module(f"layerwright.{module}"), attribute)
    except (ImportError, AttributeError) as error:
        raise InputError(f"{name}: no such object below layerwright ({error})") from error


# -- verdicts -----------------------------------------------------------------------------------------------------


def verdicts_file() -> Path:
    """Where the last verdict of each study is kept: ``~/.cache/layerwright/verdicts.json``, or below
    ``$XDG_CACHE_HOME``.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "layerwright" / "verdicts.json"


def read_verdicts() -> dict[str, dict[str, Any]]:
    """The kept verdicts by slug; nothing where the file is missing or damaged."""
    try:
        data = json.loads(verdicts_file().read_text())
    except (OSError, ValueError):
        return {}
    return {slug: item for slug, item in data.items() if isinstance(item, dict)} if isinstance(data, dict) else {}


def save_verdict(evidence: Evidence, *, quick: bool) -> None:
    """Keep the verdict of `evidence`; where the folder cannot be written, nothing is kept."""
    path = verdicts_file()
    verdicts = read_verdicts()
    verdicts[evidence.slug] = {
        "verdict": f"{evidence.verdict}{' (quick)' if quick else ''}",
        "checks": [check.to_data() for check in evidence.checks],
        "seconds": evidence.seconds,
        "seeds": list(evidence.seeds),
        "versions": dict(evidence.versions),
    }
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(verdicts, indent=1, sort_keys=True) + "\n")
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True) if path.parent.is_dir() else None


# -- documentation ------------------------------------------------------------------------------------------------


def markdown_table() -> str:
    """The systems as a Markdown table: name, paper, idea, rooms, objects."""
    lines = ["| system | paper | idea | parts |", "| --- | --- | --- | --- |"]
    for item in SYSTEMS:
        link = f"[{item.authors}, {item.year}](https://arxiv.org/abs/{item.arxiv})"
        parts = ", ".join(f"`{name}`" for name in item.objects)
        lines.append(f"| `{item.slug}` | {link} | {item.idea} | {parts} |")
    return "\n".join(lines) + "\n"
