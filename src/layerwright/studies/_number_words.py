"""Small tasks from text to text, made by code: numbers and dates in words, and words that have to be spelled."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from layerwright.data.byte_codec import ByteCodec

__all__ = ["byte_batch", "date_pair", "number_in_words", "pairs", "pseudo_words"]

_ONES = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]  # fmt: skip
_TENS = ["", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_MONTHS = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]
_DAYS = [31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31]
_TEST_SHARE = 0.1
_HISSING = ("s", "x", "z", "sh", "ch")


def number_in_words(number: int) -> str:
    """English for 0 to 999: ``seven hundred and four``."""
    if number < 20:
        return _ONES[number]
    if number < 100:
        rest = f" {_ONES[number % 10]}" if number % 10 else ""
        return _TENS[number // 10] + rest
    rest = f" and {number_in_words(number % 100)}" if number % 100 else ""
    return f"{_ONES[number // 100]} hundred{rest}"


def date_pair(day: int, month: int, year: int) -> tuple[str, str]:
    """``3 may 84`` and ``84-05-03``; `month` from 1, `year` of two digits."""
    return f"{day} {_MONTHS[month - 1]} {year:02d}", f"{year:02d}-{month:02d}-{day:02d}"


def pseudo_words(count: int = 400, seed: int = 20) -> list[str]:
    """Different words of 3 to 5 letters that no language has."""
    draw = torch.Generator().manual_seed(seed)
    heads, vowels, tails = [*"bdfgklmnprtv"], [*"aeiou"], [*"bdgklmnpstxz", "ch", "sh"]
    found: dict[str, None] = {}
    while len(found) < count:
        parts = [heads, vowels, tails] if len(found) % 2 else [heads, vowels, heads, vowels]
        picked = [kind[int(torch.randint(len(kind), (), generator=draw))] for kind in parts]
        found["".join(picked)] = None
    return list(found)


def _word_pair(kind: int, first: str, second: str) -> tuple[str, str]:
    """A plural, a past form, or two words in the other order."""
    if kind == 0:
        return f"many {first}", first + ("es" if first.endswith(_HISSING) else "s")
    if kind == 1:
        return f"past {first}", first + ("d" if first.endswith("e") else "ed")
    return f"swap {first} {second}", f"{second} {first}"


def _draw(words: Sequence[str], draw: torch.Generator) -> tuple[str, str]:
    kind, a, b, c = torch.randint(1 << 30, (4,), generator=draw).tolist()
    if kind % 3 == 0:
        return number_in_words(a % 1000), str(a % 1000)
    if kind % 3 == 1:
        month = 1 + b % 12
        return date_pair(1 + a % _DAYS[month - 1], month, c % 100)
    return _word_pair(a % 4, words[b % len(words)], words[c % len(words)])


def pairs(count: int, part: Literal["train", "test"], seed: int = 0) -> list[tuple[str, str]]:
    """Sources and targets, a third each of numbers, dates and words; no source is in both parts.

    Sources of `train` repeat, those of `test` do not. A source's part goes by its hash.
    """
    draw, words = torch.Generator().manual_seed(seed), pseudo_words()
    found: list[tuple[str, str]] = []
    seen: set[str] = set()
    while len(found) < count:
        source, target = _draw(words, draw)
        held_out = hashlib.sha256(source.encode()).digest()[0] < 256 * _TEST_SHARE
        if held_out == (part == "test") and (part == "train" or source not in seen):
            seen.add(source)
            found.append((source, target))
    return found


def byte_batch(chosen: Sequence[tuple[str, str]], codec: ByteCodec) -> dict[str, Tensor]:
    """``src``, ``tgt_in`` (after ``bos``) and ``labels`` (before ``eos``, -100 for padding), each ``(pairs, tokens)``."""
    ends = [codec.encode(target, eos=True) for _, target in chosen]
    labels = codec.pad(ends)
    return {
        "src": codec.pad([codec.encode(source, eos=True) for source, _ in chosen]),
        "tgt_in": codec.pad([[codec.special("bos"), *row[:-1]] for row in ends]),
        "labels": labels.masked_fill(labels == codec.special("pad"), -100),
    }
