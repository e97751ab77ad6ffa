"""Rows of a weight by width, as a short text that a person can edit: ``8: 0-3 17; 6: 20-24``."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping

from layerwright.core.errors import InputError

__all__ = ["rows_from_text", "rows_to_text"]

_RANGE = re.compile(r"^(\d+)(?:-(\d+))?$")


@functools.cache
def rows_from_text(text: str) -> dict[int, tuple[int, ...]]:
    """Width to its rows, both in order; widths from the largest on.

    Raises:
        InputError: malformed text, or a row that is named twice.
    """
    found: dict[int, tuple[int, ...]] = {}
    seen: set[int] = set()
    for part in filter(None, (piece.strip() for piece in text.split(";"))):
        width, colon, listed = part.partition(":")
        if not colon or not width.strip().isdigit() or int(width) in found:
            raise InputError(f"rows: got {part[:60]!r}, expected a width and its rows once, such as 8: 0-3 17")
        rows: set[int] = set()
        for word in listed.replace(",", " ").split():
            match = _RANGE.match(word)
            if not match or int(match[2] or match[1]) < int(match[1]):
                raise InputError(f"rows: got {word!r}, expected a row or a range such as 0-3")
            new = range(int(match[1]), int(match[2] or match[1]) + 1)
            twice = next((row for row in new if row in seen), None)
            if twice is not None:
                raise InputError(f"rows: row {twice} is named twice; give each row one width")
            rows.update(new)
            seen.update(new)
        if rows:
            found[int(width)] = tuple(sorted(rows))
    return dict(sorted(found.items(), reverse=True))


def rows_to_text(rows: Mapping[int, Iterable[int]]) -> str:
    """The text that `rows_from_text` reads back; runs of rows become ranges, widths without rows are left out."""
    parts = []
    for width in sorted(rows, reverse=True):
        ordered = sorted(rows[width])
        words: list[str] = []
        start = 0
        for i in range(1, len(ordered) + 1):
            if i == len(ordered) or ordered[i] != ordered[i - 1] + 1:
                first, last = ordered[start], ordered[i - 1]
                words.append(str(first) if first == last else f"{first}-{last}")
                start = i
        if words:
            parts.append(f"{width}: {' '.join(words)}")
    return "; ".join(parts)
