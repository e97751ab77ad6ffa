"""What SubTuning found, for people: the profile of the blocks and those it chose."""

from __future__ import annotations

import json
from pathlib import Path

from layerwright.cli.console import say, show_table

__all__ = ["show_subtuning"]


def show_subtuning(out: Path) -> None:
    """Print the profile and the choice that lie in the folder `out`."""
    data = json.loads((out / "subtuning.json").read_text(encoding="utf-8"))
    chosen = data["blocks"]
    rows = [
        [
            " + ".join(row["blocks"]),
            f"{row['accuracy']:.2%}",
            f"{row['std']:.2%}",
            ", ".join(str(chosen.index(block) + 1) for block in row["blocks"] if block in chosen),
        ]
        for row in data["profile"]
    ]
    show_table("Fine-tuning profile", ["trained with the readout", "accuracy", "±", "chosen"], rows)
    named = ", ".join(chosen) or "none, the readout alone"
    say(f"chosen: {named}; cross-validated {data['accuracy']:.2%}, the readout alone {data['baseline']:.2%}")
