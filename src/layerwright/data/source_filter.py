"""Speech of many voices by a source and filters, for where no program speaks: a letter is a sound."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from layerwright.core.errors import InputError
from layerwright.data.spoken import Utterance

__all__ = ["LETTERS", "SourceFilterVoice", "source_filter_corpus"]

_RATE, _HOP, _WINDOW = 16_000, 80, 640
"""Samples per second, from one set of formants to the next (5 ms), and of a transform."""

# First three formants (Hz), voice, noise, centre of the noise (Hz), seconds.
_Sound = tuple[float, float, float, float, float, float, float]
_VOWELS: Mapping[str, _Sound] = {
    "a": (750, 1300, 2500, 1.0, 0, 0, 0.11),
    "e": (530, 1850, 2500, 1.0, 0, 0, 0.10),
    "i": (300, 2250, 3000, 1.0, 0, 0, 0.10),
    "o": (500, 900, 2450, 1.0, 0, 0, 0.11),
    "u": (320, 800, 2300, 1.0, 0, 0, 0.10),
}
_OTHERS: Mapping[str, _Sound] = {
    "b": (250, 900, 2300, 0.25, 0.10, 900, 0.06),
    "d": (250, 1700, 2600, 0.25, 0.15, 3500, 0.06),
    "f": (400, 1200, 2500, 0.0, 0.25, 6500, 0.08),
    "g": (250, 2100, 2400, 0.25, 0.12, 2000, 0.06),
    "h": (500, 1500, 2500, 0.05, 0.20, 1500, 0.06),
    "k": (300, 2000, 2500, 0.0, 0.35, 2200, 0.06),
    "l": (360, 1300, 2900, 0.6, 0, 0, 0.07),
    "m": (250, 1000, 2200, 0.45, 0, 0, 0.07),
    "n": (250, 1600, 2500, 0.45, 0, 0, 0.07),
    "p": (300, 800, 2300, 0.0, 0.30, 800, 0.06),
    "r": (330, 1100, 1600, 0.6, 0, 0, 0.07),
    "s": (300, 1700, 2600, 0.0, 0.50, 6000, 0.09),
    "t": (300, 1700, 2600, 0.0, 0.40, 4500, 0.06),
    "v": (300, 1100, 2400, 0.35, 0.12, 6000, 0.07),
    "w": (300, 650, 2200, 0.55, 0, 0, 0.07),
    "y": (280, 2200, 2900, 0.55, 0, 0, 0.06),
    "z": (300, 1700, 2600, 0.30, 0.30, 6000, 0.08),
    " ": (450, 1400, 2500, 0.0, 0, 0, 0.05),
}
_SOUNDS: Mapping[str, _Sound] = {**_VOWELS, **_OTHERS}
LETTERS = "".join(sorted(_SOUNDS))
"""What can be said."""
_BANDWIDTHS = (80.0, 110.0, 160.0)


@dataclass(frozen=True)
class SourceFilterVoice:
    """A voice.

    Attributes:
        name: its name.
        pitch_hz: about which it speaks.
        formant_scale: of all formants: above 1 for a shorter throat.
        breathiness: 0 to 1, share of noise in the source.
        tilt_hz: where the source's spectrum begins to fall by 12 dB an octave.
        speed: of its sounds.

    Raises:
        InputError: a number outside its range.
    """

    name: str
    pitch_hz: float = 120.0
    formant_scale: float = 1.0
    breathiness: float = 0.1
    tilt_hz: float = 600.0
    speed: float = 1.0

    def __post_init__(self) -> None:
        if not 40 <= self.pitch_hz <= 500 or not 0.5 <= self.formant_scale <= 2 or not 0 <= self.breathiness <= 1:
            raise InputError(
                f"voice {self.name!r}: got pitch_hz={self.pitch_hz}, formant_scale={self.formant_scale}, "
                f"breathiness={self.breathiness}; expected 40 to 500, 0.5 to 2 and 0 to 1"
            )
        if self.tilt_hz <= 0 or not 0.25 <= self.speed <= 4:
            raise InputError(
                f"voice {self.name!r}: got tilt_hz={self.tilt_hz}, speed={self.speed}, expected above 0, and 0.25 to 4"
            )


def source_filter_corpus(
    sentences: Sequence[str], voices: Sequence[SourceFilterVoice], *, seed: int = 0
) -> list[Utterance]:
    """What each voice says of each sentence at 16 kHz, voice after voice.

    Pulses and noise pass through three resonances that glide from letter to letter. Pitch and pace vary a little with
    the seed, the voice and the sentence, and with nothing else: the same three give the same samples.

    Args:
        sentences: of `LETTERS`.
        voices: who speaks.
        seed: of everything random.

    Raises:
        InputError: no sentences or voices, an empty sentence, or a letter that is no sound.
    """
    if not sentences or not voices:
        raise InputError(f"got {len(sentences)} sentences and {len(voices)} voices, expected at least one of each")
    for sentence in sentences:
        if not sentence.strip() or set(sentence) - _SOUNDS.keys():
            raise InputError(f"sentence {sentence[:40]!r}: expected some of the letters {LETTERS!r}")
    return [
        Utterance(_speak(sentence, voice, seed), _RATE, sentence, voice.name)
        for voice in voices
        for sentence in sentences
    ]


def _speak(sentence: str, voice: SourceFilterVoice, seed: int) -> Tensor:
    digest = hashlib.sha256(repr((seed, voice.name, sentence)).encode()).digest()
    draw = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    sounds = torch.tensor([_SOUNDS[letter] for letter in sentence])
    pace = (0.06 * torch.randn(len(sounds), generator=draw)).exp() / voice.speed
    frames = (sounds[:, 6] * pace * (_RATE / _HOP)).round().clamp(min=3).long()
    track = torch.repeat_interleave(sounds[:, :6], frames, 0)
    smooth = F.avg_pool1d(F.pad(track.T[None], (3, 3), mode="replicate"), 7, 1)[0].T  # 35 ms from sound to sound
    count = len(smooth)
    fall = torch.linspace(1.08, 0.92, count) * (0.03 * torch.randn((), generator=draw)).exp()
    wave = 1 + 0.02 * torch.sin(2 * torch.pi * 5 * torch.arange(count) * _HOP / _RATE)
    pitch = torch.repeat_interleave(voice.pitch_hz * fall * wave, _HOP)
    turns = (pitch.double() / _RATE).cumsum(0).floor()
    pulses = torch.diff(turns, prepend=turns.new_zeros(1)).float() * (_RATE / pitch).sqrt()
    noise = torch.randn(len(pulses), generator=draw)
    hertz = torch.linspace(0, _RATE / 2, _WINDOW // 2 + 1)
    throat = _resonances(smooth[:, :3] * voice.formant_scale, hertz) / (1 + (hertz / voice.tilt_hz).square())
    centre, width = smooth[:, 4:6][:, 1:], 1200.0
    # Noise in frames without any has no centre: its weight is 0.
    hiss = smooth[:, 4:5] * (-0.5 * ((hertz - centre * voice.formant_scale**0.5) / width).square()).exp()
    breath = voice.breathiness
    filtered = _filtered(pulses, smooth[:, 3:4] * throat * (1 - 0.5 * breath)) + _filtered(
        noise, smooth[:, 3:4] * throat * (0.6 * breath) + 0.2 * hiss
    )
    return 0.7 * filtered / filtered.abs().max()


def _resonances(formants: Tensor, hertz: Tensor) -> Tensor:
    """Gains ``(frames, bins)``: the sum of three resonances ``(frames, 3)``, each 1 high."""
    gains = torch.tensor([1.0, 0.8, 0.6])
    away = (hertz - formants[..., None]) / torch.tensor(_BANDWIDTHS)[:, None]
    return (gains[:, None] / (1 + away.square())).sum(1) * (1 + hertz / 1500)


def _filtered(source: Tensor, gains: Tensor) -> Tensor:
    """`source` ``(frames * hop,)`` with its spectrum multiplied by gains ``(frames, bins)``."""
    window = torch.hann_window(_WINDOW)
    spectrum = torch.stft(source, _WINDOW, _HOP, window=window, return_complex=True, pad_mode="constant")
    last = F.pad(gains.T, (0, spectrum.shape[1] - len(gains)), mode="replicate")
    return torch.istft(spectrum * last, _WINDOW, _HOP, window=window, length=len(source))
