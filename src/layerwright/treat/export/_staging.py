"""Outputs that appear complete or not at all, and one line for what a format cannot express."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from layerwright.core.errors import CheckpointError
from layerwright.treat.writer import beside, staged_folder, unwritable

__all__ = ["refuse", "staged_file", "staged_folder", "target_file"]

_NAMED = 3


def refuse(format: str, problems: Sequence[tuple[str, str]], remedy: str = "") -> None:
    """Raise one line for all `problems` ``(layer, reason)``; none is fine.

    Raises:
        CheckpointError: it names the first layers, and the remedy.
    """
    if not problems:
        return
    named = ", ".join(f"{layer} ({reason})" for layer, reason in problems[:_NAMED])
    more = f" and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
    remedy = remedy or "use --dequantize to write plain weights, or --format safetensors"
    raise CheckpointError(f"{format} cannot express {named}{more}: {remedy}")


@contextmanager
def staged_file(out: Path, name: str, force: bool) -> Iterator[Path]:
    """A path to write to; what lies in its folder moves to `out` (if it ends like `name`) or ``out/name`` afterwards.

    Raises:
        CheckpointError: the file is there and `force` is not set, or it cannot be written.
    """
    target = target_file(out, name)
    if target.is_dir():
        raise CheckpointError(f"{target} is a folder: give the path of a file, or the folder it goes to")
    if target.exists() and not force:
        raise CheckpointError(f"{target} is already there: give another name, or pass --force to replace it")
    _require_writable(target)
    temporary = beside(target)
    try:
        yield temporary / target.name
        target.parent.mkdir(parents=True, exist_ok=True)
        for path in sorted(temporary.iterdir(), key=lambda path: (path.name == target.name, path.name)):
            path.replace(target.parent / path.name)
    except OSError as error:
        raise unwritable(target, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def target_file(out: Path, name: str) -> Path:
    """`out` itself where it ends like `name`, else ``out/name``."""
    return out if out.suffix == Path(name).suffix else out / name


def _require_writable(target: Path) -> None:
    parent = next(path for path in target.absolute().parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise CheckpointError(f"{target} cannot be written ({parent} is read-only or a file): give another place")
