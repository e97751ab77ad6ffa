"""One colour and one mark per treatment, the same in every chart and table."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

__all__ = ["NEUTRAL", "Mark", "palette"]

NEUTRAL = "#9AA0A6"
"""Layers that the plan leaves alone."""

# Okabe and Ito (2008): told apart with every common kind of colour blindness. Their black is left out, because it
# would vanish on a dark page.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star")
_PATTERNS = ("", "/", ".", "x")
_PLAIN = ("kept", "not planned")


@dataclass(frozen=True)
class Mark:
    """How a treatment looks: fill `colour`, marker `symbol` of scatter charts, `pattern` of bars, `ink` on the fill."""

    colour: str
    symbol: str = "circle"
    pattern: str = ""
    ink: str = "#000000"


_DROP = {"drop": Mark("#5B616A", "x-thin-open", "", "#ffffff")}


def palette(labels: Iterable[str]) -> Mapping[str, Mark]:
    """A mark for every label, in natural order (``int2`` before ``int16``).

    Colours repeat after seven labels, then with another pattern and symbol, so that every pair among 28 still differs.
    What is dropped or left alone is grey.
    """
    found = set(labels)
    named = sorted(found - {*_PLAIN, *_DROP}, key=_natural)
    marks = {}
    for index, label in enumerate(named):
        turn, place = divmod(index, len(_COLOURS))
        colour = _COLOURS[place]
        symbol = _SYMBOLS[(place + turn) % len(_SYMBOLS)] + ("-open" if turn else "")
        marks[label] = Mark(colour, symbol, _PATTERNS[turn % len(_PATTERNS)], _ink(colour))
    fixed = _DROP | {label: Mark(NEUTRAL, "circle-open") for label in _PLAIN}
    return marks | {label: mark for label, mark in fixed.items() if label in found}


def _natural(label: str) -> list[tuple[int, int, str]]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", label) if part]


def _ink(colour: str) -> str:
    """Black or white, whichever has the larger contrast on `colour` (relative luminance of WCAG 2)."""
    channels = (int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if (luminance + 0.05) ** 2 > 0.05 * 1.05 else "#ffffff"
