"""Mel spectra and Griffin-Lim."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from layerwright.data.mel import (
    MelSettings,
    griffin_lim,
    magnitude_spectrogram,
    mel_filters,
    mel_spectrogram,
    mel_to_magnitude,
    spectral_convergence,
)
from layerwright.data.source_filter import SourceFilterVoice, source_filter_corpus
from oracles.tdass import mel_triangles

SMALL = MelSettings(rate=16_000, bins=40)


def clip() -> torch.Tensor:
    return source_filter_corpus(["green lamp"], [SourceFilterVoice("one", 180.0)])[0].samples


@pytest.mark.parametrize("settings", [MelSettings(), SMALL, MelSettings(8000, 256, 64, 20, 100.0, 3900.0)])
def test_filters_are_the_slow_ones(settings: MelSettings) -> None:
    slow = mel_triangles(settings.rate, settings.window, settings.bins, settings.low_hz, settings.high_hz)
    assert torch.allclose(mel_filters(settings).double(), slow, atol=1e-7)


@pytest.mark.parametrize("hertz", [200.0, 440.0, 1000.0, 3000.0, 6500.0])
def test_a_pure_tone_peaks_in_its_band(hertz: float) -> None:
    time = torch.arange(16_000) / 16_000
    mel = mel_spectrogram(torch.sin(2 * torch.pi * hertz * time), SMALL, 16_000)
    assert mel.shape == (16_000 // 256 + 1, 40)
    bin_of_tone = round(hertz / 16_000 * 1024)
    assert int(mel[10:50].mean(0).argmax()) == int(mel_filters(SMALL)[:, bin_of_tone].argmax())


def test_logarithm_of_magnitude_and_its_floor() -> None:
    sound = torch.randn(2, 4000, generator=torch.Generator().manual_seed(0))
    magnitude = magnitude_spectrogram(sound, SMALL)
    assert magnitude.shape == (2, 16, 513)
    # Frame 8 by hand: 1024 samples around sample 8 * 256.
    own = torch.fft.rfft(sound[1, 2048 - 512 : 2048 + 512] * torch.hann_window(1024)).abs()
    assert torch.allclose(magnitude[1, 8], own, atol=1e-4)
    mel = mel_spectrogram(sound, SMALL)
    assert torch.allclose(mel[1, 8], (mel_filters(SMALL) @ own).log(), atol=1e-4)
    assert torch.allclose(mel_spectrogram(2 * sound, SMALL), mel + torch.tensor(2.0).log(), atol=1e-4)
    assert bool((mel_spectrogram(torch.zeros(4000), SMALL) == torch.tensor(1e-5).log()).all())
    half = mel_spectrogram(sound.bfloat16(), SMALL)
    assert half.dtype == torch.float32 and float((half - mel).abs().mean()) < 0.02


def test_griffin_lim_reaches_20_db() -> None:
    sound = clip()
    magnitude = magnitude_spectrogram(sound, SMALL)
    reached = [
        spectral_convergence(griffin_lim(magnitude, SMALL, iterations=count), magnitude, SMALL) for count in (1, 15, 60)
    ]
    assert reached[0] > reached[1] > reached[2]
    assert reached[2] < -20
    assert len(griffin_lim(magnitude, SMALL, iterations=1)) == (len(magnitude) - 1) * 256


def test_the_plain_form_never_gets_worse_and_the_fast_one_gets_further() -> None:
    magnitude = magnitude_spectrogram(clip(), SMALL)
    plain = [
        spectral_convergence(griffin_lim(magnitude, SMALL, iterations=count, momentum=0), magnitude, SMALL)
        for count in range(1, 12)
    ]
    # Inconsistency of what is handed in, not of what comes out, is what falls in theory: a hair of slack.
    assert all(later < earlier + 0.05 for earlier, later in pairwise(plain))
    fast = spectral_convergence(griffin_lim(magnitude, SMALL, iterations=60), magnitude, SMALL)
    slow = spectral_convergence(griffin_lim(magnitude, SMALL, iterations=60, momentum=0), magnitude, SMALL)
    assert fast < slow - 3


def test_griffin_lim_is_seeded_and_batched() -> None:
    magnitude = magnitude_spectrogram(clip(), SMALL)
    one = griffin_lim(magnitude, SMALL, iterations=3, generator=torch.Generator().manual_seed(4))
    again = griffin_lim(magnitude, SMALL, iterations=3, generator=torch.Generator().manual_seed(4))
    other = griffin_lim(magnitude, SMALL, iterations=3, generator=torch.Generator().manual_seed(5))
    assert torch.equal(one, again) and not torch.equal(one, other)
    both = griffin_lim(
        torch.stack((magnitude, magnitude * 2)), SMALL, iterations=3, generator=torch.Generator().manual_seed(4)
    )
    assert both.shape == (2, len(one)) and torch.allclose(both[0], one, atol=1e-5)
    sharper = griffin_lim(magnitude.bfloat16(), SMALL, iterations=3, power=1.2)
    assert sharper.dtype == torch.float32 and bool(sharper.isfinite().all())


def test_back_from_mel() -> None:
    mel = mel_spectrogram(clip(), SMALL)
    errors = {}
    for method in ("clamp", "nnls"):
        found = mel_to_magnitude(mel, SMALL, method)  # type: ignore[arg-type]
        assert found.shape == (len(mel), 513) and float(found.min()) >= 0
        errors[method] = float((found @ mel_filters(SMALL).T - mel.exp()).norm() / mel.exp().norm())
    assert errors["nnls"] < 1e-4 < errors["clamp"] < 0.2
    sound = griffin_lim(mel_to_magnitude(mel, SMALL, "nnls"), SMALL)
    loud = mel > mel.max() - 6
    assert float((mel_spectrogram(sound, SMALL) - mel)[loud].abs().mean()) < 0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MelSettings(hop=0), "hop"),
        (lambda: MelSettings(16_000, high_hz=9000.0), "high_hz"),
        (lambda: MelSettings(floor=0.0), "floor"),
        (
            lambda: mel_spectrogram(torch.zeros(4000), SMALL, 22_050),
            "rate: got samples at 22050 Hz for settings of 16000",
        ),
        (lambda: mel_spectrogram(torch.zeros(512), SMALL), "samples: got shape"),
        (lambda: mel_to_magnitude(torch.zeros(5, 80), SMALL), r"mel: .*frames, 40"),
        (lambda: mel_to_magnitude(torch.zeros(5, 40), SMALL, "lasso"), "method"),  # type: ignore[arg-type]
        (lambda: griffin_lim(torch.zeros(5, 40), SMALL), "magnitude: got shape"),
        (lambda: griffin_lim(torch.zeros(5, 513), SMALL, momentum=1.0), "momentum"),
        (lambda: spectral_convergence(torch.zeros(4000), torch.zeros(5, 513), SMALL), "magnitude: got shape"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
