"""Windows of bytes, from the standard library's sources or a file of the user's own, in a part to train on and one held out."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from layerwright.core.corpus import read_texts
from layerwright.core.errors import InputError
from layerwright.data.stdlib import Split, stdlib_files

__all__ = ["byte_parts", "even_windows", "random_windows"]

HELDOUT_SHARE = 0.1


@cache
def _library(split: Split) -> Tensor:
    return _joined(path.read_bytes() for path in stdlib_files(split))


def _joined(texts: object) -> Tensor:
    return torch.frombuffer(bytearray(b"\0".join(texts)), dtype=torch.uint8)  # type: ignore[arg-type]


def byte_parts(path: str | Path | None = None, *, least: int = 0) -> tuple[Tensor, Tensor]:
    """What to train on and what is held out, uint8 ``(bytes,)`` each, a zero byte between documents.

    Args:
        path: ``.txt``, ``.jsonl`` or ``.parquet``, whose last tenth is held out; None takes the library's sources, which are
            split by file.
        least: bytes that the held-out part must have.

    Raises:
        FileNotFoundError: no such file.
        InputError: the file cannot be read as text, or is too short.
    """
    if path is None:
        return _library("train"), _library("heldout")
    stream = _joined(text.encode() for text in read_texts(path))
    kept = len(stream) - max(int(len(stream) * HELDOUT_SHARE), least)
    if kept < 4 * max(least, 1):
        raise InputError(
            f"data: {path} has {len(stream)} bytes, expected at least {5 * max(least, 1)}; give a longer text"
        )
    return stream[:kept], stream[kept:]


def random_windows(stream: Tensor, count: int, length: int, *, seed: int = 0) -> Tensor:
    """`count` windows ``(count, length)`` at random places, int64.

    Raises:
        InputError: windows longer than the stream.
    """
    _check(stream, length)
    draw = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(stream) - length + 1, (count, 1), generator=draw)
    return stream[starts + torch.arange(length)].long()


def even_windows(stream: Tensor, count: int, length: int) -> Tensor:
    """At most `count` windows ``(count, length)`` evenly spread over the stream without overlap, int64.

    Raises:
        InputError: windows longer than the stream.
    """
    _check(stream, length)
    starts = torch.linspace(0, len(stream) - length, max(1, min(count, len(stream) // length))).long()
    return stream[starts[:, None] + torch.arange(length)].long()


def _check(stream: Tensor, length: int) -> None:
    if not 1 <= length <= len(stream):
        raise InputError(f"length: got {length}, expected 1 to {len(stream)} bytes")
