"""Utterances with their text and voice, and padded batches of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from layerwright.core.errors import InputError

__all__ = ["SpeechBatch", "Utterance", "speech_batches", "text_ids", "trim_silence"]


@dataclass(frozen=True)
class Utterance:
    """What a voice said.

    Attributes:
        samples: ``(samples,)`` from -1 to 1.
        rate: of them in a second.
        text: what was said, as characters or phonemes.
        voice: who said it.
    """

    samples: Tensor
    rate: int
    text: str
    voice: str

    @property
    def seconds(self) -> float:
        """How long it takes."""
        return len(self.samples) / self.rate


class SpeechBatch(NamedTuple):
    """Padded utterances.

    Attributes:
        text: ids ``(batch, symbols)``, 0 behind the end.
        text_lengths: ``(batch,)``.
        mel: ``(batch, frames, bins)``, 0 behind the end.
        mel_lengths: ``(batch,)``.
        speaker: ids ``(batch,)``.
    """

    text: Tensor
    text_lengths: Tensor
    mel: Tensor
    mel_lengths: Tensor
    speaker: Tensor


def text_ids(texts: Sequence[str], symbols: str) -> tuple[Tensor, Tensor]:
    """Ids ``(batch, symbols)`` of texts, from 1 in the order of `symbols` and 0 behind the end, and lengths ``(batch,)``.

    Raises:
        InputError: no text, an empty one, or a symbol that is not in `symbols`.
    """
    if not texts:
        raise InputError("texts: got none, expected at least one")
    known = {symbol: number for number, symbol in enumerate(symbols, 1)}
    rows = []
    for text in texts:
        if not text:
            raise InputError("text: got an empty one, expected at least one symbol")
        if missing := sorted(set(text) - known.keys()):
            raise InputError(f"text {text[:40]!r}: unknown symbols {missing}, expected some of {symbols!r}")
        rows.append(torch.tensor([known[symbol] for symbol in text]))
    return pad_sequence(rows, batch_first=True), torch.tensor([len(row) for row in rows])


def speech_batches(
    texts: Sequence[str],
    mels: Sequence[Tensor],
    speakers: Sequence[int],
    symbols: str,
    size: int,
    generator: torch.Generator | None = None,
) -> list[SpeechBatch]:
    """Padded batches, in random order with a generator; the last one may be smaller.

    Args:
        texts, mels, speakers: of each utterance; mels are ``(frames, bins)``.
        symbols: see `text_ids`.
        size: utterances in a batch.

    Raises:
        InputError: a size below 1, unequal numbers, or see `text_ids`.
    """
    if size < 1:
        raise InputError(f"size: got {size}, expected at least 1")
    if not len(texts) == len(mels) == len(speakers):
        raise InputError(
            f"got {len(texts)} texts, {len(mels)} mels, {len(speakers)} speakers, expected as many of each"
        )
    ids, lengths = text_ids(texts, symbols)
    frames, who = torch.tensor([len(mel) for mel in mels]), torch.tensor(speakers)
    order = torch.arange(len(texts)) if generator is None else torch.randperm(len(texts), generator=generator)
    return [
        SpeechBatch(
            ids[rows, : int(lengths[rows].max())],
            lengths[rows],
            pad_sequence([mels[row] for row in rows.tolist()], batch_first=True),
            frames[rows],
            who[rows],
        )
        for rows in order.split(size)
    ]


def trim_silence(samples: Tensor, rate: int, below_db: float = 40.0) -> Tensor:
    """`samples` ``(samples,)`` without frames of 10 ms at both ends that are `below_db` under the loudest one.

    Raises:
        InputError: not a row of samples, or nothing but silence.
    """
    if samples.dim() != 1 or not len(samples) or not bool(samples.any()):
        raise InputError(f"samples: got shape {tuple(samples.shape)}, expected a row that is not silent")
    hop = max(1, rate // 100)
    loudness = torch.nn.functional.pad(samples, (0, -len(samples) % hop)).view(-1, hop).square().mean(1)
    loud = (loudness >= loudness.max() * 10 ** (-below_db / 10)).nonzero()[:, 0]
    return samples[int(loud[0]) * hop : (int(loud[-1]) + 1) * hop]
