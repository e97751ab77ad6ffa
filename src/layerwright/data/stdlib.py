"""The text of Python's own standard library, split by file into training, calibration and held-out parts."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

__all__ = ["stdlib_files", "stdlib_text"]

Split = Literal["train", "calibration", "heldout"]

_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "lib2to3"}


def _split_of(relative: str) -> Split:
    # By name, not by position: the same file lands in the same part under every Python version.
    bucket = hashlib.sha256(relative.encode()).digest()[0] % 20
    return "heldout" if bucket == 0 else "calibration" if bucket == 1 else "train"


def stdlib_files(split: Split, root: Path | None = None) -> Iterator[Path]:
    """Yield the standard library's ``*.py`` files that belong to `split`, in sorted order.

    A file's part depends on its relative path alone: of twenty equal buckets one is held out, one is for
    calibration and the rest are for training.

    Raises:
        FileNotFoundError: this Python ships without its library sources.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    found = False
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED_FOLDERS.intersection(relative.parts[:-1]):
            continue
        found = True
        if _split_of(relative.as_posix()) == split:
            yield path
    if not found:
        raise FileNotFoundError(
            f"no library sources (*.py) under {root}: this Python ships without them; pass your own text with --data"
        )


def stdlib_text(split: Split, limit_bytes: int | None = None, root: Path | None = None) -> list[str]:
    """Return the documents (one per file) of `split`, at most `limit_bytes` of UTF-8 in all.

    Files are taken in the order of a hash of their name, so that a short slice is a varied one.
    """
    files = sorted(stdlib_files(split, root), key=lambda p: hashlib.sha256(p.name.encode()).hexdigest())
    texts: list[str] = []
    used = 0
    for path in files:
        text = path.read_text(encoding="utf-8", errors="replace")
        if limit_bytes is not None and used + len(text.encode()) > limit_bytes:
            text = text.encode()[: limit_bytes - used].decode("utf-8", errors="ignore")
        if text:
            texts.append(text)
            used += len(text.encode())
        if limit_bytes is not None and used >= limit_bytes:
            break
    return texts
