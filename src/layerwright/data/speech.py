"""Small speech to learn from: generated patterns of symbols, or digits that espeak-ng says."""

from __future__ import annotations

import math
import shutil
import subprocess
import tempfile
import wave
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from layerwright.core.errors import InputError, unknown_name

__all__ = ["SpeechSet", "espeak_digits", "generated_speech", "log_mel", "small_speech"]

Source = Literal["auto", "espeak", "generated"]
PROGRAM = "espeak-ng"
_PATTERN_SEED = 20_230_904
"""Of the symbols' patterns, which all sets share."""
_TIMEOUT_S = 30


@dataclass(frozen=True)
class SpeechSet:
    """Utterances and what is said in them.

    Attributes:
        features: ``(frames, channels)`` of each.
        labels: of each, from 1; 0 is left for blank.
        symbols: labels and blank.
        source: where it comes from.
    """

    features: tuple[Tensor, ...]
    labels: tuple[tuple[int, ...], ...]
    symbols: int
    source: str

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def channels(self) -> int:
        """Features of a frame."""
        return self.features[0].shape[1]

    def batches(self, size: int, generator: torch.Generator | None = None) -> Iterator[dict[str, Tensor]]:
        """Padded batches, in random order with a generator.

        Each has ``features (batch, frames, channels)``, ``feature_lengths``, ``targets (batch, labels)`` and
        ``target_lengths``.

        Raises:
            InputError: a size below 1.
        """
        if size < 1:
            raise InputError(f"batch_size: got {size}, expected at least 1")
        order = list(range(len(self))) if generator is None else torch.randperm(len(self), generator=generator).tolist()
        for first in range(0, len(order), size):
            rows = order[first : first + size]
            labels = [torch.tensor(self.labels[row], dtype=torch.long) for row in rows]
            yield {
                "features": torch.nn.utils.rnn.pad_sequence([self.features[row] for row in rows], batch_first=True),
                "feature_lengths": torch.tensor([len(self.features[row]) for row in rows]),
                "targets": torch.nn.utils.rnn.pad_sequence(labels, batch_first=True),
                "target_lengths": torch.tensor([len(own) for own in labels]),
            }


def generated_speech(
    count: int,
    seed: int = 0,
    *,
    symbols: int = 8,
    channels: int = 12,
    lengths: tuple[int, int] = (3, 7),
    durations: tuple[int, int] = (2, 5),
    noise: float = 0.3,
) -> SpeechSet:
    """Strings of symbols as patterns like those of speech.

    Each symbol is two peaks over the channels, as formants are, that glide from one place to another within a random
    number of frames. A speaker moves all peaks and the loudness of his utterance; noise is added.

    Args:
        count: utterances.
        seed: of everything random but the symbols' patterns, which are the same for all sets.
        symbols: different ones, without blank.
        channels: of a frame.
        lengths: least and most symbols of an utterance.
        durations: least and most frames of a symbol.
        noise: its standard deviation; a peak is about 1 high.

    Raises:
        InputError: a number out of its range.
    """
    if count < 1 or symbols < 2 or channels < 4 or noise < 0:
        raise InputError(
            f"speech: got count={count}, symbols={symbols}, channels={channels}, noise={noise}; "
            "expected at least 1, 2, 4 and 0"
        )
    for name, (low, high) in (("lengths", lengths), ("durations", durations)):
        if not 1 <= low <= high:
            raise InputError(f"{name}: got {(low, high)}, expected least and most, from 1")
    shapes = torch.Generator().manual_seed(_PATTERN_SEED)
    peaks = torch.rand(symbols, 2, 2, generator=shapes) * (channels - 1)  # symbol, formant, where it starts and ends
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, size: int) -> Tensor:
        return torch.randint(low, high + 1, (size,), generator=generator)

    said = draw(*lengths, count)
    labels = draw(0, symbols - 1, int(said.sum()))
    spans = draw(*durations, len(labels))
    which = torch.repeat_interleave(torch.arange(len(labels)), spans)
    within = torch.arange(len(which)) - (spans.cumsum(0) - spans)[which]
    progress = within / (spans[which] - 1).clamp(min=1)
    speaker = torch.repeat_interleave(torch.arange(count), said)[which]
    shift = 0.5 * torch.randn(count, generator=generator)
    gain = (0.2 * torch.randn(count, generator=generator)).exp()
    own = peaks[labels[which]]
    places = own[..., 0] + (own[..., 1] - own[..., 0]) * progress[:, None] + shift[speaker][:, None]
    bumps = (-0.5 * ((places[..., None] - torch.arange(channels)) / 0.9).square()).exp().sum(1)
    frames = gain[speaker][:, None] * bumps + noise * torch.randn(len(which), channels, generator=generator)
    frames_of = torch.zeros(count, dtype=torch.long).index_add_(0, speaker, torch.ones_like(speaker))
    strings = [tuple(part.tolist()) for part in (labels + 1).split(said.tolist())]
    return SpeechSet(tuple(frames.split(frames_of.tolist())), tuple(strings), symbols + 1, "generated")


def espeak_digits(
    count: int,
    seed: int = 0,
    *,
    channels: int = 12,
    lengths: tuple[int, int] = (3, 7),
    program: str | None = None,
    voices: Sequence[str] = ("en-us", "en-gb"),
) -> SpeechSet:
    """Strings of digits that espeak-ng says in random voices, at random speeds and pitches; digit ``d`` is label d + 1.

    Runs the program once for each utterance.

    Args:
        count: utterances.
        seed: of everything random.
        channels: of the log-mel features, of 25 ms every 10 ms.
        lengths: least and most digits of an utterance.
        program: path or name of espeak-ng; None looks it up.
        voices: that are drawn from.

    Raises:
        FileNotFoundError: the program is not installed.
        InputError: a number out of its range, or the program failed.
    """
    if count < 1 or not 1 <= lengths[0] <= lengths[1]:
        raise InputError(f"count, lengths: got {count}, {lengths}, expected at least 1, and least and most from 1")
    found = shutil.which(program or PROGRAM)
    if found is None:
        raise FileNotFoundError(f"{program or PROGRAM} is not installed; install espeak-ng, or use generated_speech")
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    features, labels = [], []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(count):
            digits = [draw(0, 9) for _ in range(draw(*lengths))]
            voice = voices[draw(0, len(voices) - 1)]
            samples, rate = _say(found, digits, voice, draw(130, 220), draw(20, 80), Path(folder) / "said.wav")
            features.append(log_mel(samples, rate, channels))
            labels.append(tuple(digit + 1 for digit in digits))
    return SpeechSet(tuple(features), tuple(labels), 11, "espeak-ng")


def small_speech(count: int, seed: int = 0, source: Source = "auto") -> SpeechSet:
    """Digits of espeak-ng where it is installed, generated speech elsewhere; `source` can insist.

    Raises:
        FileNotFoundError: espeak-ng is asked for and not installed.
        InputError: an unknown source, or see `generated_speech`.
    """
    if source not in get_args(Source):
        raise unknown_name("source", str(source), get_args(Source))
    if source == "espeak" or (source == "auto" and shutil.which(PROGRAM)):
        return espeak_digits(count, seed)
    return generated_speech(count, seed)


def log_mel(samples: Tensor, rate: int, channels: int = 12, window_ms: float = 25.0, hop_ms: float = 10.0) -> Tensor:
    """Logarithms of the energy in bands that are even in mel, ``(frames, channels)``, mean 0 and deviation 1.

    Args:
        samples: ``(samples,)``, at least one window of them.
        rate: samples per second.
        channels: bands from 60 Hz to half the rate.
        window_ms, hop_ms: length of a frame, and from one to the next.

    Raises:
        InputError: shorter than one window.
    """
    window, hop = round(rate * window_ms / 1000), round(rate * hop_ms / 1000)
    if samples.dim() != 1 or len(samples) < window:
        raise InputError(f"samples: got shape {tuple(samples.shape)}, expected at least {window} (one window) in a row")
    size = 2 ** math.ceil(math.log2(window))
    spectrum = torch.stft(
        samples.float(), size, hop, window, torch.hann_window(window), center=False, return_complex=True
    )
    edges = _hertz(torch.linspace(float(_mel(torch.tensor(60.0))), float(_mel(torch.tensor(rate / 2))), channels + 2))
    bins = torch.linspace(0, rate / 2, size // 2 + 1)
    rising = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    energy = torch.minimum(rising, falling).clamp(min=0) @ spectrum.abs().square()
    logs = (energy + 1e-6).log().T
    return (logs - logs.mean()) / logs.std().clamp(min=1e-3)


def _mel(hertz: Tensor) -> Tensor:
    return 2595 * torch.log10(1 + hertz / 700)


def _hertz(mel: Tensor) -> Tensor:
    return 700 * (10 ** (mel / 2595) - 1)


def _say(program: str, digits: Sequence[int], voice: str, speed: int, pitch: int, path: Path) -> tuple[Tensor, int]:
    """What the program says: samples from -1 to 1, and how many a second."""
    command = [program, "-v", voice, "-s", str(speed), "-p", str(pitch), "-w", str(path), " ".join(map(str, digits))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise InputError(f"{program}: no answer within {_TIMEOUT_S} s") from error
    if done.returncode or not path.is_file():
        raise InputError(f"{program} failed with code {done.returncode}: {' '.join(done.stderr.split())[:160]}")
    with wave.open(str(path)) as file:
        if file.getsampwidth() != 2 or file.getnchannels() != 1:
            raise InputError(
                f"{program}: got {file.getnchannels()} channels of {file.getsampwidth()} bytes, expected 1 of 2"
            )
        raw, rate = bytearray(file.readframes(file.getnframes())), file.getframerate()
    path.unlink()
    return torch.frombuffer(raw, dtype=torch.int16).float() / 32768, rate
