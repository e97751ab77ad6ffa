"""Bytes of the standard library's sources, split by file."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from layerwright.data.stdlib import stdlib_files

__all__ = ["SEPARATOR", "Split", "byte_stream", "corpus_hash", "documents"]

Split = Literal["train", "calibration", "heldout"]
SEPARATOR = 0
"""The byte between two files."""


@cache
def documents(split: Split, root: Path | None = None) -> tuple[Tensor, ...]:
    """The files of one part as uint8 tensors ``(bytes,)``, in sorted order; no file is in two parts.

    Raises:
        FileNotFoundError: this Python ships without its sources (see `layerwright.data.stdlib`).
    """
    found = (path.read_bytes() for path in stdlib_files(split, root))
    return tuple(torch.frombuffer(bytearray(text), dtype=torch.uint8) for text in found if text)


@cache
def byte_stream(split: Split, root: Path | None = None) -> Tensor:
    """All files of one part, a zero byte after each: uint8 ``(bytes,)``. Memory: the bytes, kept for the process."""
    end = torch.tensor([SEPARATOR], dtype=torch.uint8)
    return torch.cat([part for text in documents(split, root) for part in (text, end)])


def corpus_hash(root: Path | None = None) -> str:
    """The first 12 digits of the SHA-256 of all three streams: figures of unequal hashes are not compared."""
    digest = hashlib.sha256()
    for split in ("train", "calibration", "heldout"):
        digest.update(byte_stream(split, root).numpy().tobytes())
    return digest.hexdigest()[:12]
