"""Pieces of Python's standard library, by the part of it that they are from: a small task of classifying texts."""

from __future__ import annotations

import sysconfig
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from layerwright.core.errors import InputError
from layerwright.data.stdlib import Split, stdlib_files

__all__ = ["LENGTH", "LIBRARY_GROUPS", "library_pieces"]

LIBRARY_GROUPS: Mapping[str, tuple[str, ...]] = {
    "concurrency": ("asyncio", "multiprocessing", "concurrent"),
    "internet": ("email", "http", "urllib", "html", "xml", "xmlrpc", "wsgiref"),
    "encodings": ("encodings",),
    "tools": ("distutils", "unittest", "importlib", "logging"),
}
LENGTH = 256
"""Bytes of a piece."""


@cache
def _group_files(split: Split) -> tuple[tuple[bytes, ...], ...]:
    """Contents of the files of each group that hold a piece at least."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts: dict[str, list[bytes]] = {folder: [] for folders in LIBRARY_GROUPS.values() for folder in folders}
    for path in stdlib_files(split):
        folder = path.relative_to(root).parts[0]
        if folder in texts and len(text := path.read_bytes()) >= LENGTH:
            texts[folder].append(text)
    return tuple(tuple(text for folder in folders for text in texts[folder]) for folders in LIBRARY_GROUPS.values())


def library_pieces(split: Split, count: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """`count` pieces of 256 bytes ``(count, 256)`` and their groups ``(count,)``, as many of each, at random places.

    Files are drawn in proportion to their size. Parts share no file.

    Raises:
        InputError: a group without files in this part.
    """
    draw = torch.Generator().manual_seed(seed)
    pieces, labels = [], []
    for label, (name, texts) in enumerate(zip(LIBRARY_GROUPS, _group_files(split), strict=True)):
        if not texts:
            raise InputError(f"{name}: this Python's library has no files of this group in the {split} part")
        places = torch.tensor([len(text) - LENGTH + 1 for text in texts])
        ends = places.cumsum(0)
        taken = count // len(LIBRARY_GROUPS) + (label < count % len(LIBRARY_GROUPS))
        drawn = torch.randint(int(ends[-1]), (taken,), generator=draw)
        files = torch.searchsorted(ends, drawn, right=True)
        starts = drawn - (ends - places)[files]
        for file, start in zip(files.tolist(), starts.tolist(), strict=True):
            pieces.append(torch.frombuffer(bytearray(texts[file][start : start + LENGTH]), dtype=torch.uint8))
        labels += [label] * taken
    order = torch.randperm(count, generator=draw)
    return torch.stack(pieces).long()[order], torch.tensor(labels)[order]
