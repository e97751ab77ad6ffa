"""What a comparison of shapes keeps on disk: each finished run, so that none is trained twice."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layerwright.core.errors import CheckpointError, InputError

__all__ = ["RESULT", "RUNS", "RunState", "write_json"]

RUNS = "runs.json"
RESULT = "shape.json"
PAGE = "shape.html"
OWN = (RUNS, RESULT, PAGE)


class RunState:
    """Finished runs by shape and seed, in a folder or in memory alone.

    Args:
        folder: None keeps nothing on disk.
        settings: runs of other settings are not mixed with these.
        force: remove what another comparison left in the folder (its own files, nothing else).

    Raises:
        InputError: the folder holds runs of other settings, or files that are not ours.
        CheckpointError: its file is damaged.
    """

    def __init__(self, folder: Path | None, settings: Mapping[str, Any], *, force: bool = False) -> None:
        self.folder, self.settings = folder, dict(settings)
        self.rows: dict[str, dict[str, Any]] = {}
        if folder is None or not folder.exists():
            return
        if force:
            for name in OWN:
                (folder / name).unlink(missing_ok=True)
        path = folder / RUNS
        if path.is_file():
            self._read(path)
        elif (found := sorted(entry.name for entry in folder.iterdir())) and not force:
            raise InputError(
                f"{folder} holds {found[0]}, which is no comparison of shapes: give another folder, or --force"
            )

    def _read(self, path: Path) -> None:
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            before, rows = dict(data["settings"]), dict(data["runs"])
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged ({error}); remove it, or give --force") from error
        if before != self.settings:
            other = sorted(
                key for key in before.keys() | self.settings.keys() if before.get(key) != self.settings.get(key)
            )
            raise InputError(
                f"{path.parent} holds a comparison with another {', '.join(other)}: give the same settings to go on, another "
                "folder, or --force"
            )
        self.rows = rows

    def get(self, key: str) -> dict[str, Any] | None:
        """The row of a finished run."""
        return self.rows.get(key)

    def add(self, key: str, row: Mapping[str, Any]) -> None:
        """Keep a finished run, on disk at once."""
        self.rows[key] = dict(row)
        if self.folder is not None:
            write_json(self.folder / RUNS, {"settings": self.settings, "runs": self.rows})


def write_json(path: Path, data: Any) -> None:
    """Write under a temporary name that is then renamed.

    Raises:
        CheckpointError: it cannot be written.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"{path} cannot be written ({error.strerror or error}): is the disk full?") from error
