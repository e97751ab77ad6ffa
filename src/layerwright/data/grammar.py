"""Short sentences of a probabilistic grammar whose probabilities are known exactly: a testbed for text generators."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from layerwright.core.errors import InputError

__all__ = ["SentenceGrammar"]

_NOUNS = [
    "dog",
    "cat",
    "bird",
    "horse",
    "child",
    "teacher",
    "doctor",
    "farmer",
    "singer",
    "painter",
    "driver",
    "baker",
    "queen",
    "wolf",
    "pilot",
    "sailor",
    "writer",
    "guard",
    "monk",
    "clerk",
    "robot",
    "giant",
]
_PLURALS = {"child": "children", "wolf": "wolves"}
_VERBS = ["run", "sleep", "sing", "work", "wait", "dance", "laugh", "jump", "swim", "read", "write", "hide", "rest"]
_THIRD = {"dance": "dances", "write": "writes", "hide": "hides"}
_WORDS: Mapping[str, Sequence[str]] = {
    "D": ["a", "this", "that", "every"],
    "d": ["some", "these", "those", "many"],
    "N": _NOUNS,
    "n": [_PLURALS.get(noun, f"{noun}s") for noun in _NOUNS],
    "V": [_THIRD.get(verb, f"{verb}s") for verb in _VERBS],
    "v": _VERBS,
    "A": [
        "old",
        "young",
        "small",
        "big",
        "happy",
        "sad",
        "quiet",
        "loud",
        "clever",
        "lazy",
        "brave",
        "green",
        "red",
        "strange",
    ],
    "R": ["slowly", "quickly", "often", "here", "today", "again", "alone", "outside"],
    "P": ["near", "behind", "with", "under", "beside"],
    "B": ["and", "but", "while"],
    "W": ["who"],
}
"""Words by class; D, N and V agree in number, small letters are plural."""
_TEMPLATES = (
    "D1 N1 V1",
    "D1 A N1 V1 R",
    "D1 N1 V1 P D2 N2",
    "D1 A N1 P D2 N2 V1 R",
    "D1 N1 W D2 A N2 V2 V1",
    "D1 A N1 V1 R B D2 N2 V2 P D1 A N1",
)


class SentenceGrammar:
    """Six templates of up to 13 words, singular or plural agreement across them, and words of Zipf frequencies.

    Word classes are disjoint, so that a sentence has one derivation at most, and probability, entropy, grammaticality and
    coverage are exact. Id 0 is padding, 1 the start symbol.

    Args:
        seed: of the order of the words of a class, and so of their frequencies.
        zipf: a word of rank `r` is drawn in proportion to ``r ** -zipf``, and so is a template; 0 makes all equal.
        max_len: positions of a sentence, at least 14: the longest one ends in padding.

    Raises:
        InputError: a number outside its range.
    """

    pad_id, start_id = 0, 1

    def __init__(self, seed: int = 0, zipf: float = 1.0, max_len: int = 14) -> None:
        if not 0 <= zipf <= 5:
            raise InputError(f"zipf: got {zipf}, expected 0 to 5")
        if max_len < 14:
            raise InputError(f"max_len: got {max_len}, expected at least 14: the longest sentence has 13 words")
        self.seed, self.zipf, self.max_len = seed, zipf, max_len
        self.classes = tuple(_WORDS)
        self.words = ("<pad>", "<start>", *itertools.chain.from_iterable(_WORDS.values()))
        draw = torch.Generator().manual_seed(seed)
        self._class_of = torch.full((len(self.words),), -1)
        self._log_word = torch.zeros(len(self.words), dtype=torch.float64)
        self._class_words: list[tuple[int, Tensor]] = []
        first = 2
        for number, words in enumerate(_WORDS.values()):
            own = slice(first, first + len(words))
            frequencies = _zipf(len(words), zipf)[torch.randperm(len(words), generator=draw)]
            self._class_of[own], self._log_word[own] = number, frequencies.log()
            self._class_words.append((first, frequencies))
            first += len(words)
        rows, template_of, weights = [], [], []
        for number, (template, weight) in enumerate(
            zip(_TEMPLATES, _zipf(len(_TEMPLATES), zipf).tolist(), strict=True)
        ):
            variants = self._variants(template)
            rows += variants
            template_of += [number] * len(variants)
            weights += [weight / len(variants)] * len(variants)
        self._patterns = torch.full((len(rows), max_len), -1)
        for row, slots in zip(self._patterns, rows, strict=True):
            row[: len(slots)] = torch.tensor(slots)
        self._template_of = torch.tensor(template_of)
        self._weights = torch.tensor(weights, dtype=torch.float64)

    def _variants(self, template: str) -> list[list[int]]:
        """The template's word classes, once for each choice of numbers."""
        slots = template.split()
        numbers = sorted({slot[1] for slot in slots if len(slot) == 2})
        result = []
        for plural in itertools.product((False, True), repeat=len(numbers)):
            chosen = dict(zip(numbers, plural, strict=True))
            names = [slot[0].lower() if len(slot) == 2 and chosen[slot[1]] else slot[0] for slot in slots]
            result.append([self.classes.index(name) for name in names])
        return result

    @property
    def vocabulary(self) -> int:
        """Words, with padding and the start symbol."""
        return len(self.words)

    @cached_property
    def entropy(self) -> float:
        """Nats of a sentence: the least that any model's mean loss over sentences can be."""
        by_class = torch.tensor([float(-(p * p.log()).sum()) for _, p in self._class_words], dtype=torch.float64)
        slots = torch.where(self._patterns >= 0, by_class[self._patterns.clamp_min(0)], 0.0).sum(1)
        return float((self._weights * (slots - self._weights.log())).sum())

    def sample(self, count: int, seed: int = 0) -> Tensor:
        """`count` sentences as ids ``(count, max_len)``, padded with 0.

        Raises:
            InputError: fewer than one.
        """
        if count < 1:
            raise InputError(f"count: got {count}, expected at least 1")
        draw = torch.Generator().manual_seed(seed)
        patterns = self._patterns[torch.multinomial(self._weights, count, replacement=True, generator=draw)]
        ids = torch.zeros(count, self.max_len, dtype=torch.long)
        for number, (first, frequencies) in enumerate(self._class_words):
            here = patterns == number
            if wanted := int(here.sum()):
                ids[here] = first + torch.multinomial(frequencies, wanted, replacement=True, generator=draw)
        return ids

    def _pattern(self, ids: Tensor) -> Tensor:
        """Which pattern each sentence ``(sentences, max_len)`` follows, -1 for none."""
        if ids.dim() != 2 or ids.shape[1] != self.max_len or ids.is_floating_point():
            raise InputError(f"ids: got {ids.dtype} of shape {tuple(ids.shape)}, expected (sentences, {self.max_len})")
        if ids.numel() and not (int(ids.min()) >= 0 and int(ids.max()) < self.vocabulary):
            raise InputError(f"ids: got {int(ids.min())} to {int(ids.max())}, expected 0 to {self.vocabulary - 1}")
        # The start symbol has no class; -2 keeps it apart from padding.
        classes = self._class_of[ids].masked_fill(ids == self.start_id, -2)
        matches = (classes[:, None] == self._patterns[None]).all(2)
        return torch.where(matches.any(1), matches.long().argmax(1), -1)

    def log_prob(self, ids: Tensor) -> Tensor:
        """Exact log-probability of each sentence ``(sentences, max_len)``, float64; -inf for what is no sentence.

        Raises:
            InputError: ids of another shape or outside the vocabulary.
        """
        pattern = self._pattern(ids)
        logs = self._weights[pattern.clamp_min(0)].log() + self._log_word[ids].sum(1)
        return logs.masked_fill(pattern < 0, -torch.inf)

    def grammaticality(self, ids: Tensor) -> float:
        """Share of the sentences that the grammar can make; errors as in `log_prob`."""
        return float((self._pattern(ids) >= 0).double().mean())

    def coverage(self, ids: Tensor) -> dict[str, float]:
        """Shares of the `templates` and of the `words` that occur in grammatical sentences; errors as in `log_prob`."""
        pattern = self._pattern(ids)
        seen = ids[pattern >= 0].unique()
        templates = self._template_of[pattern[pattern >= 0]].unique()
        return {
            "templates": len(templates) / len(_TEMPLATES),
            "words": int((seen > self.start_id).sum()) / (self.vocabulary - 2),
        }

    def decode(self, ids: Tensor) -> list[str]:
        """Sentences ``(sentences, tokens)`` as text, without padding."""
        return [" ".join(self.words[i] for i in row if i != self.pad_id) for row in ids.tolist()]


def _zipf(count: int, exponent: float) -> Tensor:
    weights = torch.arange(1, count + 1, dtype=torch.float64) ** -exponent
    return weights / weights.sum()
