"""N-grams of a set of sentences as sorted tables, one for each length, so that counting and looking up are array operations."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray
from torch import Tensor

from layerwright.core.errors import InputError

__all__ = ["Ids", "Ngrams", "Sentences", "count_pairs", "ngram_rows", "read_sentences"]

Sentences = Tensor | Sequence[Sequence[Hashable]]
"""Ids ``(sentences, tokens)`` with padding, or sentences of words."""
Ids = NDArray[numpy.int64]


def read_sentences(sentences: Sentences, words: dict[Hashable, int], pad_id: int | None, name: str) -> list[Ids]:
    """Sentences as numbers; new words join `words`. Of a tensor, a sentence ends at its first padding.

    Raises:
        InputError: no sentences, or a tensor of another shape.
    """
    rows: Sequence[Sequence[Hashable]]
    if isinstance(sentences, Tensor):
        if sentences.dim() != 2 or sentences.is_floating_point():
            raise InputError(
                f"{name}: got {sentences.dtype} of shape {tuple(sentences.shape)}, expected ids (sentences, tokens)"
            )
        rows = [row[: row.index(pad_id)] if pad_id in row else row for row in sentences.tolist()]
    else:
        rows = sentences
    if not len(rows):
        raise InputError(f"{name}: got no sentences, expected at least one")
    return [numpy.array([words.setdefault(word, len(words)) for word in row], dtype=numpy.int64) for row in rows]


def ngram_rows(lengths: Ids, size: int) -> tuple[Ids, Ids]:
    """Where in all words in a row the n-grams of a length begin, and of which sentence each is."""
    owners = numpy.repeat(numpy.arange(len(lengths)), lengths)
    ends = numpy.cumsum(lengths)[owners]
    starts = numpy.arange(len(owners))
    inside = starts + size <= ends
    return starts[inside], owners[inside]


@dataclass(frozen=True)
class Ngrams:
    """The n-grams of some sentences up to a length.

    An n-gram's number is its place in `tables`; a table holds ``number of the first n - 1 words * vocabulary + last word``,
    sorted, so that numbers never grow with the length.

    Attributes:
        vocabulary: words that have a number; a larger one is unknown.
        tables: for each length from 1.
        owners, numbers: for each length, the sentence and the number of every n-gram that occurs.
        lengths: of the sentences.
    """

    vocabulary: int
    tables: tuple[Ids, ...]
    owners: tuple[Ids, ...]
    numbers: tuple[Ids, ...]
    lengths: Ids

    @classmethod
    def of(cls, sentences: Sequence[Ids], vocabulary: int, largest: int) -> Ngrams:
        """Count n-grams of 1 to `largest` words."""
        words, lengths = numpy.concatenate(sentences), numpy.array([len(s) for s in sentences])
        tables, owners, numbers = [], [], []
        before: Ids = numpy.zeros(len(words), dtype=numpy.int64)
        for size in range(1, largest + 1):
            starts, owner = ngram_rows(lengths, size)
            keys = before[starts] * vocabulary + words[starts + size - 1]
            table, number = numpy.unique(keys, return_inverse=True)
            before = numpy.zeros(len(words), dtype=numpy.int64)
            before[starts] = number
            tables.append(table)
            owners.append(owner)
            numbers.append(number)
        return cls(vocabulary, tuple(tables), tuple(owners), tuple(numbers), lengths)

    def look_up(self, sentences: Sequence[Ids]) -> tuple[list[tuple[Ids, Ids]], Ids]:
        """For each length the sentences and numbers of all n-grams of other sentences, -1 where unknown; and their lengths."""
        words, lengths = numpy.concatenate(sentences), numpy.array([len(s) for s in sentences])
        found = []
        before: Ids = numpy.zeros(len(words), dtype=numpy.int64)
        for size, table in enumerate(self.tables, 1):
            starts, owner = ngram_rows(lengths, size)
            last = words[starts + size - 1]
            keys = before[starts] * self.vocabulary + last
            number = _places(table, keys)
            number[(before[starts] < 0) | (last >= self.vocabulary)] = -1
            before = numpy.full(len(words), -1, dtype=numpy.int64)
            before[starts] = number
            found.append((owner, number))
        return found, lengths

    def per_sentence(self, size: int) -> tuple[Ids, Ids, Ids]:
        """Sentence, number and count of each different n-gram of each sentence."""
        return count_pairs(self.owners[size - 1], self.numbers[size - 1], len(self.tables[size - 1]))

    def totals(self, size: int) -> Ids:
        """How often each n-gram occurs in all sentences."""
        return numpy.bincount(self.numbers[size - 1], minlength=len(self.tables[size - 1]))


def count_pairs(owners: Ids, numbers: Ids, count: int) -> tuple[Ids, Ids, Ids]:
    """Each different pair and how often it occurs."""
    pairs, counts = numpy.unique(owners * max(count, 1) + numbers, return_counts=True)
    return pairs // max(count, 1), pairs % max(count, 1), counts


def _places(table: Ids, keys: Ids) -> Ids:
    if not len(table):
        return numpy.full(len(keys), -1, dtype=numpy.int64)
    place = numpy.minimum(numpy.searchsorted(table, keys), len(table) - 1)
    return numpy.where(table[place] == keys, place, -1)
