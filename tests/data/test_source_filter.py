"""Generated voices."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from layerwright.data.mel import MelSettings, mel_spectrogram
from layerwright.data.source_filter import LETTERS, SourceFilterVoice, source_filter_corpus

LOW, HIGH = SourceFilterVoice("low", 100.0), SourceFilterVoice("high", 200.0)


def pitch(samples: torch.Tensor) -> float:
    """Hertz, by the peak of the autocorrelation of the middle of a vowel."""
    part = samples - samples.mean()
    power = torch.fft.rfft(part, 2 * len(part)).abs().square()
    same = torch.fft.irfft(power)[: len(part)]
    first, last = 16_000 // 320, 16_000 // 70
    return 16_000 / (first + int(same[first:last].argmax()))


@pytest.mark.parametrize("voice", [LOW, HIGH])
def test_pitch(voice: SourceFilterVoice) -> None:
    said = source_filter_corpus(["aaaa"], [voice])[0]
    middle = said.samples[len(said.samples) // 2 - 1000 : len(said.samples) // 2 + 1000]
    assert pitch(middle) == pytest.approx(voice.pitch_hz, rel=0.12)


def test_formants_and_hiss() -> None:
    """The vowel i has its second resonance high, u low, both go up with the scale; s is noise above all of them."""
    settings = MelSettings(16_000, bins=40)

    def centre(text: str, scale: float = 1.0) -> float:
        samples = source_filter_corpus([text], [SourceFilterVoice("x", 110.0, scale)])[0].samples
        energy = mel_spectrogram(samples, settings).exp().square().mean(0)[8:]
        return float((energy * torch.arange(8, 40)).sum() / energy.sum())

    assert centre("uuu") < centre("iii") < centre("sss") and centre("ooo") < centre("eee")
    assert centre("aaa", 1.2) > centre("aaa") + 0.5


def test_same_three_same_samples() -> None:
    both = source_filter_corpus(["sun", "moon"], [LOW, HIGH])
    assert [(one.voice, one.text) for one in both] == [
        ("low", "sun"),
        ("low", "moon"),
        ("high", "sun"),
        ("high", "moon"),
    ]
    assert torch.equal(both[2].samples, source_filter_corpus(["sun"], [HIGH])[0].samples)
    assert not torch.equal(both[2].samples, source_filter_corpus(["sun"], [HIGH], seed=1)[0].samples)
    every = source_filter_corpus([LETTERS.strip()], [LOW])[0]
    assert bool(every.samples.isfinite().all()) and float(every.samples.abs().max()) == pytest.approx(0.7)
    quick = source_filter_corpus(["sunsunsun"], [SourceFilterVoice("q", 100.0, speed=2.0)])[0]
    slow = source_filter_corpus(["sunsunsun"], [SourceFilterVoice("q", 100.0)])[0]
    assert slow.seconds / quick.seconds == pytest.approx(2, rel=0.15)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: source_filter_corpus([], [LOW]), "0 sentences"),
        (lambda: source_filter_corpus(["a"], []), "0 voices"),
        (lambda: source_filter_corpus(["Quark"], [LOW]), "sentence 'Quark'"),
        (lambda: source_filter_corpus([" "], [LOW]), "sentence ' '"),
        (lambda: SourceFilterVoice("a", 20.0), "pitch_hz=20"),
        (lambda: SourceFilterVoice("a", breathiness=2.0), "breathiness=2"),
        (lambda: SourceFilterVoice("a", tilt_hz=0.0), "tilt_hz=0"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
