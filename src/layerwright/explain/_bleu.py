"""BLEU of many sentences against many references: n-grams are counted once, and their largest counts are kept."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy
from numpy.typing import NDArray

from layerwright.core.errors import InputError
from layerwright.explain._sentence_ngrams import Ids, Ngrams, Sentences, count_pairs, read_sentences

__all__ = ["BleuReference", "Orders", "Scores", "corpus_bleu", "self_bleu"]

_EPSILON = 0.1
Orders = Sequence[int]
Scores = NDArray[numpy.float64]


def _sums(owners: Ids, values: Ids, count: int) -> Ids:
    """Sum of the values of each of `count` owners."""
    return numpy.bincount(owners, weights=values, minlength=count).astype(numpy.int64)


class BleuReference:
    """Reference sentences counted once: for each n-gram the largest count in a sentence, which one has it, and the next largest.

    So a sentence costs its own n-grams, however many references there are, and each may be left out in turn.

    Args:
        references: ids ``(sentences, tokens)`` padded with `pad_id`, or sentences of words.
        orders: BLEU-n to compute, each at least 1.
        pad_id: ends a sentence of ids.
        empty: whether an empty sentence is an ``error``, or is kept as one that matches nothing (``zero``).

    Raises:
        InputError: no references, an empty one where that is an error, or an order below 1.
    """

    def __init__(
        self, references: Sentences, orders: Orders = (2, 3, 4, 5), *, pad_id: int | None = 0, empty: str = "error"
    ) -> None:
        if not orders or min(orders) < 1:
            raise InputError(f"orders: got {tuple(orders)}, expected lengths of n-grams of at least 1")
        if empty not in ("error", "zero"):
            raise InputError(f"empty: got {empty!r}, expected 'error' or 'zero'")
        self.orders, self.pad_id, self.empty = tuple(orders), pad_id, empty
        self._words: dict[Hashable, int] = {}
        sentences = self._read(references, "references")
        self.count = len(sentences)
        self._ngrams = Ngrams.of(sentences, max(1, len(self._words)), max(orders))
        self._best = [self._largest(size) for size in range(1, max(orders) + 1)]
        self._lengths, self._length_counts = numpy.unique(self._ngrams.lengths, return_counts=True)

    def _read(self, sentences: Sentences, name: str) -> list[Ids]:
        read = read_sentences(sentences, self._words, self.pad_id, name)
        if self.empty == "error" and (bare := [number for number, sentence in enumerate(read) if not len(sentence)]):
            raise InputError(f"{name}: sentence {bare[0]} is empty; leave it out, or take empty='zero' to score it 0")
        return read

    def _largest(self, size: int) -> tuple[Ids, Ids, Ids]:
        """Largest count of each n-gram in a sentence, that sentence, and the largest in any other."""
        owners, numbers, counts = self._ngrams.per_sentence(size)
        order = numpy.lexsort((counts, numbers))
        numbers, counts, owners = numbers[order], counts[order], owners[order]
        total = len(self._ngrams.tables[size - 1])
        last = numpy.searchsorted(numbers, numpy.arange(total), side="right") - 1
        second = numpy.zeros(total, dtype=numpy.int64)
        several = (last > 0) & (numbers[last - 1] == numpy.arange(total)) if total else numpy.zeros(0, dtype=bool)
        second[several] = counts[last[several] - 1]
        return counts[last], owners[last], second

    def scores(self, hypotheses: Sentences, *, empty: str | None = None) -> dict[int, Scores]:
        """BLEU of each hypothesis against all references, by order; `empty` as for the references, None for the same.

        Raises:
            InputError: no hypotheses, or an empty one where that is an error.
        """
        words = dict(self._words)
        read = read_sentences(hypotheses, words, self.pad_id, "hypotheses")
        if (empty or self.empty) == "error" and any(not len(sentence) for sentence in read):
            raise InputError("hypotheses: a sentence is empty; leave it out, or take empty='zero' to score it 0")
        found, lengths = self._ngrams.look_up(read)
        matches = []
        for size, (owners, numbers) in enumerate(found, 1):
            known = numbers >= 0
            own, number, count = count_pairs(owners[known], numbers[known], len(self._ngrams.tables[size - 1]))
            matches.append(_sums(own, numpy.minimum(count, self._best[size - 1][0][number]), len(lengths)))
        return self._combine(matches, lengths, self._closest(lengths, leave_out=False))

    def leave_one_out(self) -> dict[int, Scores]:
        """BLEU of each reference against all others, by order.

        Raises:
            InputError: fewer than two references.
        """
        if self.count < 2:
            raise InputError(f"self-BLEU: got {self.count} sentence, expected at least 2 to compare")
        matches = []
        for size, (first, owner, second) in enumerate(self._best, 1):
            own, number, count = self._ngrams.per_sentence(size)
            bound = numpy.where(owner[number] == own, second[number], first[number])
            matches.append(_sums(own, numpy.minimum(count, bound), self.count))
        lengths = self._ngrams.lengths
        return self._combine(matches, lengths, self._closest(lengths, leave_out=True))

    def _closest(self, lengths: Ids, leave_out: bool) -> Ids:
        """Length of the reference that is closest to each sentence's, the shorter of two equally close."""
        wanted, places = numpy.unique(lengths, return_inverse=True)
        closest = []
        for length in wanted.tolist():
            alone = leave_out & (self._lengths == length) & (self._length_counts == 1)
            others = self._lengths[~alone]
            closest.append(min(others.tolist(), key=lambda other: (abs(other - length), other)))
        return numpy.array(closest)[places]

    def _combine(self, matches: Sequence[Ids], lengths: Ids, closest: Ids) -> dict[int, Scores]:
        logs, total = {}, numpy.zeros(len(lengths))
        for size, match in enumerate(matches, 1):
            possible = numpy.maximum(1, lengths - size + 1)
            total = total + numpy.log(numpy.where(match > 0, match, _EPSILON) / possible)
            logs[size] = total
        short = numpy.where(lengths > closest, 0.0, 1 - closest / numpy.maximum(lengths, 1))
        some = (matches[0] > 0) & (lengths > 0)
        return {order: numpy.where(some, numpy.exp(short + logs[order] / order), 0.0) for order in self.orders}


def corpus_bleu(
    samples: Sentences,
    reference: Sentences,
    orders: Orders = (2, 3, 4, 5),
    *,
    pad_id: int | None = 0,
    empty: str = "error",
) -> dict[int, float]:
    """Mean over `samples` of the sentence BLEU-n against all of `reference`, 0 to 1: quality.

    Equal weights, brevity penalty with the closest length, and smoothing method 1 of Chen and Cherry, 2014 (a precision
    without a match counts 0.1 matches); a sentence that shares no word scores 0. The mean of sentences as text GANs report it
    (Yu et al., 2017, arXiv 1609.05473), not the pooled score of Papineni et al., 2002. Arguments and errors: see
    `BleuReference`.
    """
    scores = BleuReference(reference, orders, pad_id=pad_id, empty=empty).scores(samples)
    return {order: float(values.mean()) for order, values in scores.items()}


def self_bleu(
    samples: Sentences, orders: Orders = (2, 3, 4, 5), *, pad_id: int | None = 0, empty: str = "error"
) -> dict[int, float]:
    """Mean over `samples` of the sentence BLEU-n against all others, 0 to 1: lower is more varied (Zhu et al., 2018, Texygen).

    Raises:
        InputError: fewer than two samples; see `BleuReference`.
    """
    scores = BleuReference(samples, orders, pad_id=pad_id, empty=empty).leave_one_out()
    return {order: float(values.mean()) for order, values in scores.items()}
