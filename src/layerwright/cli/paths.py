"""Whether small outputs can be written, asked before the work that makes them."""

from __future__ import annotations

import os
from pathlib import Path

from layerwright.core.errors import CheckError

__all__ = ["check_outputs"]


def check_outputs(*, file: Path | None = None, folder: Path | None = None) -> None:
    """Raise `CheckError` for a file that cannot be written, or a folder that cannot be made or written to."""
    problems: list[str] = []
    if file is not None and file.is_dir():
        problems.append(f"{file} is a folder: give the file to write")
    if folder is not None and folder.exists() and not folder.is_dir():
        problems.append(f"{folder} is a file: give a folder")
    for path in (file, folder):
        if path is None or problems:
            continue
        parent = next(place for place in [path, *path.absolute().parents] if place.exists())
        if not os.access(parent, os.W_OK) or os.statvfs(parent).f_flag & os.ST_RDONLY:
            problems.append(f"{path} cannot be written (read-only): give a place you may write to")
        elif parent.is_file() and parent != path:
            problems.append(f"{path} cannot be written ({parent} is a file): give another place")
    if problems:
        raise CheckError(problems)
