"""Words of a text as numbers, for models that write sentences of a fixed length."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from layerwright.core.errors import CheckpointError, InputError

__all__ = ["WordVocabulary", "split_sentences"]

_SPECIAL = ("<pad>", "<start>", "<unknown>")
_WORD = re.compile(r"\w+(?:['’-]\w+)*|[^\w\s]")


def split_sentences(texts: Iterable[str]) -> list[str]:
    """Sentences of `texts`: lines, cut behind ``.``, ``!`` and ``?`` that a blank follows; without empty ones."""
    lines = (line for text in texts for line in text.splitlines())
    return [part.strip() for line in lines for part in re.split(r"(?<=[.!?])\s+", line) if part.strip()]


class WordVocabulary:
    """The commonest words of a text, in lower case; punctuation marks are words. Ids 0, 1 and 2 are padding, start and unknown.

    Args:
        words: all words, beginning with the three symbols.

    Raises:
        InputError: other symbols at the beginning, or a word twice.
    """

    pad_id, start_id, unknown_id = 0, 1, 2

    def __init__(self, words: Sequence[str]) -> None:
        if tuple(words[:3]) != _SPECIAL or len(set(words)) != len(words):
            raise InputError(f"words: expected {', '.join(_SPECIAL)} and then different words")
        self.words = tuple(words)
        self._ids = {word: number for number, word in enumerate(words)}

    @classmethod
    def from_texts(cls, texts: Iterable[str], size: int = 5000, *, least: int = 1) -> Self:
        """The `size` commonest words that occur `least` times or more; of equally common ones the first in the alphabet.

        Raises:
            InputError: no word, or a size that holds none.
        """
        if size < len(_SPECIAL) + 1 or least < 1:
            raise InputError(f"size, least: got {size}, {least}, expected at least {len(_SPECIAL) + 1} and 1")
        counts = Counter(word for text in texts for word in _WORD.findall(text.lower()))
        ranked = sorted(
            (word for word, count in counts.items() if count >= least), key=lambda word: (-counts[word], word)
        )
        if not ranked:
            raise InputError(f"texts: got no word that occurs {least} times; give more text or a smaller least")
        return cls([*_SPECIAL, *ranked[: size - len(_SPECIAL)]])

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, texts: Sequence[str], max_len: int) -> Tensor:
        """Ids ``(texts, max_len)``, cut or padded.

        Raises:
            InputError: no texts, one without a word, or `max_len` below 1.
        """
        if not texts or max_len < 1:
            raise InputError(
                f"texts, max_len: got {len(texts)}, {max_len}, expected at least one text and one position"
            )
        ids = torch.full((len(texts), max_len), self.pad_id)
        for number, (row, text) in enumerate(zip(ids, texts, strict=True)):
            found = [self._ids.get(word, self.unknown_id) for word in _WORD.findall(text.lower())[:max_len]]
            if not found:
                raise InputError(f"texts: number {number} holds no word; leave it out")
            row[: len(found)] = torch.tensor(found)
        return ids

    def decode(self, ids: Tensor) -> list[str]:
        """Sentences ``(sentences, tokens)`` as text up to their first padding, words apart.

        Raises:
            InputError: ids outside the vocabulary.
        """
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= len(self)):
            raise InputError(f"ids: got {int(ids.min())} to {int(ids.max())}, expected 0 to {len(self) - 1}")
        rows = [row[: row.index(self.pad_id)] if self.pad_id in row else row for row in ids.tolist()]
        return [" ".join(self.words[i] for i in row) for row in rows]

    def save(self, path: str | Path) -> None:
        """Write the words as JSON."""
        Path(path).write_text(json.dumps(list(self.words), ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """What `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            CheckpointError: it holds something else.
        """
        try:
            words = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls([str(word) for word in words])
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{path} holds no word vocabulary ({error})") from error
