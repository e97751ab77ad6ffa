"""The published variants of the vision backbones, counted, beside what their papers print.

``python -m layerwright.models.published --write docs/layers/sizes.md`` writes the table of the documentation.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module, resources
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from layerwright.models.backbone import count_macs

__all__ = ["Published", "build", "published", "sizes_table"]


@dataclass(frozen=True)
class Published:
    """One published variant.

    Attributes:
        name: as the paper calls it.
        network: module and class below ``layerwright.models``, such as ``cswin.CSWinTransformer``.
        config: name for ``from_config``.
        size: height and width of the pictures.
        parameters: of the authors' public code, to the unit.
        gmacs: thousands of millions of multiply-adds of one picture by that code; None if it is not known.
        printed: parameters and operations as the paper prints them.
        changes: settings that differ from the config.
        channels: of the pictures.
    """

    name: str
    network: str
    config: str
    size: int
    parameters: int
    gmacs: float | None
    printed: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    channels: int = 3


@cache
def published() -> tuple[Published, ...]:
    """All variants, in the order of the file."""
    text = resources.files("layerwright.models").joinpath("published.yaml").read_text()
    return tuple(Published(**row) for row in yaml.safe_load(text))


def build(variant: Published) -> nn.Module:
    """The network without weights, on the meta device, in evaluation mode."""
    module, _, name = variant.network.rpartition(".")
    network: Any = getattr(import_module(f"layerwright.models.{module}"), name)
    with torch.device("meta"):
        model: nn.Module = network.from_config(variant.config, **variant.changes)
    return model.eval()


def sizes_table() -> str:
    """The table as Markdown: counted here, counted on the authors' code, printed."""
    lines = [
        "| variant (pixels) | parameters | GMACs | authors' code: parameters | GMACs | printed |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for variant in published():
        model = build(variant)
        parameters = sum(p.numel() for p in model.parameters())
        macs = count_macs(model, variant.size, variant.channels) / 1e9
        known = "" if variant.gmacs is None else f"{variant.gmacs:.3f}"
        lines.append(
            f"| {variant.name} ({variant.size}) | {parameters:,} | {macs:.3f} | {variant.parameters:,} | {known} | "
            f"{variant.printed} |"
        )
    return "\n".join(lines) + "\n"


def _main() -> None:
    parser = argparse.ArgumentParser(description="Write the table of published variants.")
    parser.add_argument(
        "--write", type=Path, required=True, help="a Markdown file whose text after the marker is replaced"
    )
    path: Path = parser.parse_args().write
    marker = "<!-- sizes -->\n"
    head = path.read_text().partition(marker)[0] if path.exists() else "# Sizes of the published variants\n\n"
    path.write_text(head + marker + "\n" + sizes_table())


if __name__ == "__main__":
    _main()
