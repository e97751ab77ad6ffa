"""Speech of one target voice and four others, and how near to the truth a trained network speaks."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from layerwright.data.espeak import PROGRAM, espeak_corpus
from layerwright.data.mel import MelSettings, mel_spectrogram
from layerwright.data.source_filter import SourceFilterVoice, source_filter_corpus
from layerwright.data.spoken import SpeechBatch, Utterance, speech_batches, text_ids
from layerwright.explain.speech_distance import diagonal_attention, mel_cepstral_distortion, speaker_similarity
from layerwright.models.speaker_classifier import SpeakerClassifier
from layerwright.models.tacotron2 import Tacotron2
from layerwright.tune._loop import Schedule, train_

__all__ = [
    "SETTINGS",
    "SYMBOLS",
    "TARGET",
    "VOICES",
    "WORDS",
    "Corpus",
    "Speech",
    "corpus",
    "pooled_memory",
    "probe_share",
    "spoken",
    "train_listener",
]

Source = Literal["espeak-ng", "source and filters"]
WORDS = (
    "red", "big", "dog", "sun", "hat", "man", "fish", "milk", "wind", "sand", "lamp", "bed", "hand", "gold", "star",
    "moon", "rain", "leaf", "song", "ship", "hill", "bell", "king", "ring", "nest", "pond", "vest", "west", "desk",
    "drum", "flag", "frog", "grass", "hot", "wet", "soft", "map", "pen", "mud", "tent",
)  # fmt: skip
SYMBOLS = " abdefghiklmnoprstuvwyz"
SETTINGS = MelSettings(rate=16_000, window=1024, hop=256, bins=40, high_hz=8000.0)
TARGET, VOICES = 0, 5
ESPEAK_VOICES = ("en-us+f3", "en-us+m1", "en-us+m3", "en-us+m7", "en-us+f5")
GENERATED_VOICES = (
    SourceFilterVoice("target", 205.0, 1.15, 0.30, 700.0),
    SourceFilterVoice("low", 95.0, 0.90, 0.05, 500.0),
    SourceFilterVoice("middle", 125.0, 1.00, 0.10, 600.0),
    SourceFilterVoice("rough", 110.0, 0.95, 0.50, 900.0),
    SourceFilterVoice("high", 250.0, 1.25, 0.10, 800.0),
)


@dataclass(frozen=True)
class Speech:
    """Utterances as the networks see them.

    Attributes:
        texts: what is said.
        mels: logarithms, standardised over the training set, ``(frames, bins)`` each.
        speakers: ids; the target is 0.
    """

    texts: tuple[str, ...]
    mels: tuple[Tensor, ...]
    speakers: tuple[int, ...]

    def batches(self, size: int, seed: int | None = None) -> list[SpeechBatch]:
        """Padded batches; with a seed, utterances of about the same length are together, which spares padding."""
        order = list(range(len(self.texts)))
        if seed is not None:
            noise = 4 * torch.randn(len(order), generator=torch.Generator().manual_seed(seed))
            order = (torch.tensor([len(mel) for mel in self.mels]) + noise).argsort().tolist()
        texts, mels, speakers = (
            [self.texts[k] for k in order],
            [self.mels[k] for k in order],
            [self.speakers[k] for k in order],
        )
        return speech_batches(texts, mels, speakers, SYMBOLS, size)


@dataclass(frozen=True)
class Corpus:
    """Parts that share no phrase.

    Attributes:
        train: few utterances of the target, many of each other voice.
        test: the target's.
        others: of the other voices, for the probe.
        listen, listen_test: of all voices, for the classifier of speakers.
        mean, deviation: that standardise, ``(bins,)``.
        source: what speaks.
    """

    train: Speech
    test: Speech
    others: Speech
    listen: Speech
    listen_test: Speech
    mean: Tensor
    deviation: Tensor
    source: str

    def logarithms(self, mel: Tensor) -> Tensor:
        """A standardised spectrum as it was."""
        return mel * self.deviation + self.mean


def _phrases(counts: Sequence[int], seed: int, lengths: tuple[int, int]) -> list[list[str]]:
    """Lists of phrases of different words, so many in each list, none twice in all."""
    draw = torch.Generator().manual_seed(seed)
    seen: dict[str, None] = {}
    while len(seen) < sum(counts):
        size = int(torch.randint(lengths[0], lengths[1] + 1, (), generator=draw))
        seen[" ".join(WORDS[k] for k in torch.randperm(len(WORDS), generator=draw)[:size].tolist())] = None
    order = list(seen)
    ends = torch.tensor([0, *counts]).cumsum(0).tolist()
    return [order[a:b] for a, b in pairwise(ends)]


def _say(source: Source, voice: int, phrases: Sequence[str], seed: int) -> list[Utterance]:
    if source == "espeak-ng":
        return espeak_corpus(phrases, [ESPEAK_VOICES[voice]], SETTINGS.rate)
    return source_filter_corpus(phrases, [GENERATED_VOICES[voice]], seed=seed)


@cache
def corpus(
    target: int, other: int, test: int, listen: int, seed: int, source: Source | None = None, most_words: int = 3
) -> Corpus:
    """Speech of phrases of two words or more.

    Args:
        target, other: training utterances of the target, and of each other voice.
        test: utterances of the target, and as many of the other voices together, that are not trained on.
        listen: of each voice, for the classifier of speakers; a third of that to test it.
        seed: of the phrases.
        source: espeak-ng if it is installed, if left out.
        most_words: of a phrase.
    """
    source = source or ("espeak-ng" if shutil.which(PROGRAM) else "source and filters")
    voices = range(VOICES)
    few, share = -(-listen // 3), test // 4
    lists = iter(
        _phrases(
            [target, *[other] * 4, test, *[share] * 4, *[listen] * 5, *[few] * 5], seed, (2, most_words)
        )
    )  # fmt: skip
    parts: list[list[tuple[int, Utterance]]] = []
    for who in (voices, [TARGET], voices[1:], voices, voices):
        parts.append([(voice, said) for voice in who for said in _say(source, voice, next(lists), seed)])
    spectra = [[mel_spectrogram(said.samples, SETTINGS, said.rate) for _, said in part] for part in parts]
    every = torch.cat(spectra[0])
    mean, deviation = every.mean(0), every.std(0)
    made = [
        Speech(
            tuple(said.text for _, said in part),
            tuple((mel - mean) / deviation for mel in mels),
            tuple(voice for voice, _ in part),
        )
        for part, mels in zip(parts, spectra, strict=True)
    ]
    train, tests, others, heard, heard_tests = made
    return Corpus(train, tests, others, heard, heard_tests, mean, deviation, source)


def train_listener(data: Corpus, *, steps: int, seed: int = 0) -> tuple[SpeakerClassifier, float]:
    """A classifier of speakers that heard real clips alone, in evaluation mode, and its accuracy on others."""
    model = SpeakerClassifier(SETTINGS.bins, VOICES, generator=torch.Generator().manual_seed(seed))

    def loss(running: nn.Module, batch: SpeechBatch) -> Tensor:
        return nn.functional.cross_entropy(running(batch.mel, batch.mel_lengths), batch.speaker)

    batches = data.listen.batches(16, seed)
    train_(
        model, batches, loss, Schedule(steps, 3e-3, 0.01, seed=seed), name="listener", distributed=False, training=True
    )
    model.eval()
    with torch.no_grad():
        right = [model(b.mel, b.mel_lengths).argmax(1) == b.speaker for b in data.listen_test.batches(64)]
    return model, float(torch.cat(right).float().mean())


@torch.no_grad()
def spoken(model: Tacotron2, data: Corpus, listener: SpeakerClassifier, *, max_steps: int, seed: int) -> dict[str, Any]:
    """What the network says in the target's voice, by itself, beside the truth: means over the test phrases."""
    ids, lengths = text_ids(data.test.texts, SYMBOLS)
    who = torch.full((len(ids),), TARGET)
    draw = torch.Generator().manual_seed(seed)
    with warnings.catch_warnings():  # whether it stopped is in the table
        warnings.simplefilter("ignore", UserWarning)
        said = model.infer(ids, who, max_steps, generator=draw, text_lengths=lengths)
    mels = [mel[:size] for mel, size in zip(said.mel, said.mel_lengths.tolist(), strict=True)]
    likely = listener(said.mel, said.mel_lengths).softmax(1)[:, TARGET]
    pairs = list(zip(mels, data.test.mels, strict=True))
    steps = said.mel_lengths // model.config.frames_per_step
    return {
        "target probability": float(likely.mean()),
        "cosine to the truth": sum(speaker_similarity(listener, a, b) for a, b in pairs) / len(pairs),
        "MCD, dB": sum(mel_cepstral_distortion(data.logarithms(a), data.logarithms(b)) for a, b in pairs) / len(pairs),
        "diagonal attention": float(diagonal_attention(said.alignments, lengths, steps).mean()),
        "frames, said over true": float(said.mel_lengths.sum()) / sum(len(mel) for mel in data.test.mels),
        "stopped": float(said.stopped.float().mean()),
    }


@torch.no_grad()
def pooled_memory(model: Tacotron2, data: Speech) -> Tensor:
    """The mean of the memory over symbols, ``(utterances, encoder_dim)``, in evaluation mode."""
    model.eval()
    ids, lengths = text_ids(data.texts, SYMBOLS)
    memory = model.encode(ids, lengths, torch.tensor(data.speakers))
    return memory.sum(1) / lengths[:, None]


def probe_share(model: Tacotron2, data: Corpus, *, decay: float = 1e-2) -> float:
    """Share of unseen utterances of other voices that a linear probe calls the target's.

    The probe is a logistic regression from the pooled memory of the training utterances, standardised, both classes
    weighted alike, with an L2 penalty.
    """
    x, other = pooled_memory(model, data.train), pooled_memory(model, data.others)
    mean, deviation = x.mean(0), x.std(0).clamp(min=1e-6)
    x, other = (x - mean) / deviation, (other - mean) / deviation
    y = torch.tensor(data.train.speakers) == TARGET
    weight = torch.where(y, 0.5 / y.float().mean(), 0.5 / (~y).float().mean())
    w, b = torch.zeros(x.shape[1], requires_grad=True), torch.zeros((), requires_grad=True)
    solver = torch.optim.LBFGS([w, b], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        loss = nn.functional.binary_cross_entropy_with_logits(x @ w + b, y.float(), weight) + decay * w.square().sum()
        torch.autograd.backward(loss)
        return loss

    with torch.enable_grad():
        solver.step(closure)
    return float((other @ w + b > 0).float().mean())
