"""BLEU pair by pair, an n-gram model by dictionaries, returns by two loops: the slow obvious forms."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from fractions import Fraction

__all__ = ["ngrams", "returns", "self_bleu", "sentence_bleu", "witten_bell_nll"]

Sentence = Sequence[Hashable]


def ngrams(sentence: Sentence, size: int) -> list[tuple[Hashable, ...]]:
    """All runs of `size` words."""
    return [tuple(sentence[i : i + size]) for i in range(len(sentence) - size + 1)]


def sentence_bleu(references: Sequence[Sentence], hypothesis: Sentence, order: int) -> float:
    """BLEU of one sentence, equal weights, 0.1 matches where there are none; references are counted again each time."""
    total = 0.0
    for size in range(1, order + 1):
        counts = Counter(ngrams(hypothesis, size))
        matches = 0
        for gram, count in counts.items():
            matches += min(count, max(Counter(ngrams(reference, size))[gram] for reference in references))
        if size == 1 and matches == 0:
            return 0.0
        possible = max(1, sum(counts.values()))
        precision = Fraction(matches, possible) if matches else 0.1 / possible
        total += math.log(precision) / order
    closest = min((abs(len(r) - len(hypothesis)), len(r)) for r in references)[1]
    penalty = 1.0 if len(hypothesis) > closest else math.exp(1 - closest / len(hypothesis))
    return penalty * math.exp(total)


def self_bleu(sentences: Sequence[Sentence], order: int) -> float:
    """Mean BLEU of each sentence against all others."""
    scores = [
        sentence_bleu([*sentences[:i], *sentences[i + 1 :]], sentence, order) for i, sentence in enumerate(sentences)
    ]
    return sum(scores) / len(scores)


def witten_bell_nll(samples: Sequence[Sentence], reference: Sequence[Sentence], order: int, vocabulary: int) -> float:
    """Nats of a word of `reference` under a model of `samples`, one word and one history at a time."""
    seen: dict[tuple[Hashable, ...], Counter[Hashable]] = {}
    for sentence in samples:
        words = ["<s>"] * (order - 1) + list(sentence) + ["</s>"]
        for place in range(order - 1, len(words)):
            for length in range(order):
                seen.setdefault(tuple(words[place - length : place]), Counter())[words[place]] += 1
    losses = []
    for sentence in reference:
        words = ["<s>"] * (order - 1) + list(sentence) + ["</s>"]
        for place in range(order - 1, len(words)):
            p = 1.0 / (vocabulary + 1)
            for length in range(order):
                after = seen.get(tuple(words[place - length : place]))
                if after:
                    p = (after[words[place]] + len(after) * p) / (sum(after.values()) + len(after))
            losses.append(-math.log(p))
    return sum(losses) / len(losses)


def returns(
    word: Sequence[Sequence[float]], sentence: Sequence[float], gamma: float, clip: float | None = None
) -> list[list[float]]:
    """``sum over u >= t of gamma^u R_s R_w(u)``, row by row."""
    bound = math.inf if clip is None else clip
    result = []
    for row, whole in zip(word, sentence, strict=True):
        result.append(
            [
                sum(gamma**u * min(whole, bound) * min(row[u], bound) for u in range(t, len(row)))
                for t in range(len(row))
            ]
        )
    return result
