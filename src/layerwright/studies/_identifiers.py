"""Lines of Python as words: which statement is it, told from its identifiers alone?"""

from __future__ import annotations

import hashlib
import keyword
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from layerwright.data.stdlib import Split, stdlib_text

__all__ = [
    "CLASSES",
    "LENGTH",
    "MASK",
    "PADDING",
    "SPECIALS",
    "START",
    "UNKNOWN",
    "Identifiers",
    "Lines",
    "identifiers",
]

CLASSES = ("def", "class", "import", "return", "if", "for", "with", "raise")
SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[MASK]")
PADDING, UNKNOWN, START, MASK = range(4)
LENGTH = 12
_WORD = re.compile(r"[A-Za-z_]\w*")
_RESERVED_SHARE, _RESERVED_MOST = 0.13, 40
Line = tuple[int, list[str]]


@dataclass(frozen=True)
class Lines:
    """Lines as numbers of words.

    Attributes:
        ids: ``(lines, LENGTH)``: the start, identifiers, padding.
        labels: place in `CLASSES`, ``(lines,)``.
    """

    ids: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Identifiers:
    """Words by frequency and lines of three kinds.

    Attributes:
        strings: string of each id: specials, the vocabulary by frequency, then all other words.
        closed: ids below this are the vocabulary.
        train: lines of training files, without reserved words.
        test: lines of held-out files.
        unseen: lines with a word that no line of training has: from held-out files, and all with reserved words.
        unseen_words: how many such words there are.
    """

    strings: tuple[str, ...]
    closed: int
    train: Lines
    test: Lines
    unseen: Lines
    unseen_words: int


@cache
def identifiers(vocabulary: int = 8000, limit_bytes: int | None = None) -> Identifiers:
    """Lines of the standard library that begin with one of `CLASSES` and have two identifiers or more.

    The first word goes, so that the others must tell. Of words of up to 40 lines an eighth is reserved, by a hash of
    the word: no line with one of them is in training.

    Args:
        vocabulary: how many words of training, the most frequent ones, are in it.
        limit_bytes: of text of each part.
    """
    train, other = _lines("train", limit_bytes), _lines("heldout", limit_bytes)
    counts = Counter(word for _, words in train for word in words)
    reserved = {word for word, count in counts.items() if count <= _RESERVED_MOST and _share(word) < _RESERVED_SHARE}
    kept = [line for line in train if reserved.isdisjoint(line[1])]
    seen = Counter(word for _, words in kept for word in words)
    known = [word for word, _ in sorted(seen.items(), key=lambda pair: (-pair[1], pair[0]))][:vocabulary]
    strange = [line for line in (*train, *other) if any(word not in seen for word in line[1])]
    more = sorted({word for line in (*kept, *other, *strange) for word in line[1]} - set(known))
    strings = (*SPECIALS, *known, *more)
    place = {word: number for number, word in enumerate(strings)}
    closed = len(SPECIALS) + len(known)
    unseen_words = len({word for line in strange for word in line[1] if word not in seen})
    train_lines, test_lines, unseen_lines = (_numbers(lines, place) for lines in (kept, other, strange))
    return Identifiers(strings, closed, train_lines, test_lines, unseen_lines, unseen_words)


def _lines(split: Split, limit_bytes: int | None) -> list[Line]:
    found = []
    for text in stdlib_text(split, limit_bytes):
        for line in text.splitlines():
            words = _WORD.findall(line)
            if len(words) < 3 or not line.lstrip().startswith(words[0]):
                continue
            kind = "import" if words[0] == "from" else words[0]
            rest = [word for word in words[1:] if not keyword.iskeyword(word)][: LENGTH - 1]
            if kind in CLASSES and len(rest) >= 2:
                found.append((CLASSES.index(kind), rest))
    return found


def _share(word: str) -> float:
    return hashlib.sha256(word.encode()).digest()[0] / 256


def _numbers(lines: Sequence[Line], place: dict[str, int]) -> Lines:
    rows = [[START, *(place[word] for word in words)] for _, words in lines]
    padded = [row + [PADDING] * (LENGTH - len(row)) for row in rows]
    return Lines(torch.tensor(padded), torch.tensor([label for label, _ in lines]))
