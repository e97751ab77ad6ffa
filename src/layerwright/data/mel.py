"""Logarithmic mel spectra, and sound from them by Griffin-Lim; torch.stft is all it takes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from layerwright.core.errors import InputError, unknown_name

__all__ = [
    "MelSettings",
    "griffin_lim",
    "magnitude_spectrogram",
    "mel_filters",
    "mel_spectrogram",
    "mel_to_magnitude",
    "spectral_convergence",
]


@dataclass(frozen=True)
class MelSettings:
    """How sound becomes a mel spectrum; the defaults are those of Tacotron 2.

    Attributes:
        rate: samples per second.
        window: samples of a frame (a Hann window), and of its transform.
        hop: samples from one frame to the next.
        bins: mel bands.
        low_hz, high_hz: range of the bands.
        floor: least magnitude before the logarithm.

    Raises:
        InputError: a number outside its range.
    """

    rate: int = 22_050
    window: int = 1024
    hop: int = 256
    bins: int = 80
    low_hz: float = 0.0
    high_hz: float = 8000.0
    floor: float = 1e-5

    def __post_init__(self) -> None:
        if min(self.rate, self.bins) < 1 or not 1 <= self.hop <= self.window // 2 or self.floor <= 0:
            raise InputError(
                f"got rate={self.rate}, bins={self.bins}, hop={self.hop}, window={self.window}, floor={self.floor}; "
                "expected rate and bins from 1, hop of 1 to half the window, a floor above 0"
            )
        if not 0 <= self.low_hz < self.high_hz <= self.rate / 2:
            raise InputError(
                f"low_hz, high_hz: got {self.low_hz}, {self.high_hz}, expected 0 to {self.rate / 2} in this order"
            )


@lru_cache(maxsize=8)
def mel_filters(settings: MelSettings) -> Tensor:
    """Triangles ``(bins, window // 2 + 1)``, even in Slaney's mel (linear to 1 kHz, then logarithmic), of equal area.

    Source: Slaney, 1998, Auditory Toolbox. They are shared: do not change them.
    """
    low, high = _mel(torch.tensor([settings.low_hz, settings.high_hz], dtype=torch.float64)).tolist()
    edges = _hertz(torch.linspace(low, high, settings.bins + 2, dtype=torch.float64))
    bins = torch.linspace(0, settings.rate / 2, settings.window // 2 + 1, dtype=torch.float64)
    rising = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    return (torch.minimum(rising, falling).clamp(min=0) * (2 / (edges[2:] - edges[:-2]))[:, None]).float()


def magnitude_spectrogram(samples: Tensor, settings: MelSettings, rate: int | None = None) -> Tensor:
    """Magnitudes ``(..., frames, window // 2 + 1)`` of ``(..., samples)`` in float32, frames centred on their samples.

    Args:
        samples: more than half a window of them; there are ``samples // hop + 1`` frames.
        settings: of the transform.
        rate: of the samples, if it shall be checked.

    Raises:
        InputError: too few samples, or another rate than the settings'.
    """
    return _stft(_checked(samples, settings, rate), settings).abs().mT


def mel_spectrogram(samples: Tensor, settings: MelSettings, rate: int | None = None) -> Tensor:
    """Natural logarithms of mel magnitudes, ``(..., frames, bins)`` of ``(..., samples)``, in float32.

    Raises:
        InputError: too few samples, or another rate than the settings'.
    """
    magnitude = magnitude_spectrogram(samples, settings, rate)
    return (magnitude @ mel_filters(settings).to(magnitude.device).T).clamp(min=settings.floor).log()


def mel_to_magnitude(
    mel: Tensor, settings: MelSettings, method: Literal["clamp", "nnls"] = "clamp", iterations: int = 100
) -> Tensor:
    """Magnitudes ``(..., frames, window // 2 + 1)`` whose mel spectrum is near to ``(..., frames, bins)``.

    Args:
        mel: logarithms, as of `mel_spectrogram`.
        settings: those that it was made with.
        method: ``clamp`` takes the pseudo-inverse and sets negative values to 0; ``nnls`` goes on from there to the
            non-negative least squares solution by accelerated projected gradients (Beck and Teboulle, 2009).
        iterations: of ``nnls``.

    Raises:
        InputError: another number of bins, or an unknown method.
    """
    if mel.dim() < 2 or mel.shape[-1] != settings.bins:
        raise InputError(f"mel: got shape {tuple(mel.shape)}, expected (..., frames, {settings.bins})")
    if method not in ("clamp", "nnls"):
        raise unknown_name("method", str(method), ("clamp", "nnls"))
    filters = mel_filters(settings).to(mel.device)
    wanted = mel.float().exp()
    found = (wanted @ torch.linalg.pinv(filters).T).clamp(min=0)
    if method == "clamp":
        return found
    rate = 1 / float(torch.linalg.matrix_norm(filters, 2)) ** 2
    ahead, speed = found, 1.0
    for _ in range(iterations):
        new = (ahead - rate * (ahead @ filters.T - wanted) @ filters).clamp(min=0)
        faster = (1 + (1 + 4 * speed * speed) ** 0.5) / 2
        ahead, found, speed = new + (speed - 1) / faster * (new - found), new, faster
    return found


def griffin_lim(
    magnitude: Tensor,
    settings: MelSettings,
    *,
    iterations: int = 60,
    momentum: float = 0.99,
    power: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Samples ``(..., hop (frames - 1))`` whose spectrum has about these magnitudes ``(..., frames, window // 2 + 1)``.

    Starts with random phases. Sources: Griffin and Lim, 1984; the fast form with momentum is by Perraudin, Balazs and
    Søndergaard, 2013.

    Args:
        magnitude: not negative.
        settings: of the transform.
        iterations: each is a transform and its inverse.
        momentum: 0 (the plain form, whose error never rises) to below 1.
        power: to which the magnitudes are raised first; 1.2 sharpens spectra that a network has smoothed.
        generator: of the phases, on the CPU; seed 0 if left out.

    Raises:
        InputError: another shape, or a number outside its range.
    """
    wide = settings.window // 2 + 1
    if magnitude.dim() < 2 or magnitude.shape[-1] != wide or magnitude.shape[-2] < 2:
        raise InputError(f"magnitude: got shape {tuple(magnitude.shape)}, expected (..., frames from 2, {wide})")
    if iterations < 1 or not 0 <= momentum < 1 or power <= 0:
        raise InputError(
            f"got iterations={iterations}, momentum={momentum}, power={power}; expected from 1, 0 to below 1, above 0"
        )
    size = magnitude.float().pow(power).mT.reshape(-1, wide, magnitude.shape[-2])
    turns = torch.rand(size.shape, generator=generator or torch.Generator().manual_seed(0)).to(size.device)
    phase = torch.polar(torch.ones_like(size), 2 * torch.pi * turns)
    behind: Tensor | None = None
    samples = _istft(size * phase, settings)
    for _ in range(iterations):
        found = _stft(samples, settings)
        ahead = found if behind is None else torch.sub(found, behind, alpha=momentum / (1 + momentum))
        behind = found if momentum else None
        samples = _istft(size * torch.sgn(ahead), settings)
    return samples.reshape(*magnitude.shape[:-2], samples.shape[-1])


def spectral_convergence(samples: Tensor, magnitude: Tensor, settings: MelSettings) -> float:
    """How far magnitudes of `samples` ``(..., samples)`` are from `magnitude`, in dB of its norm; lower is better.

    Raises:
        InputError: the shapes do not go together.
    """
    found = magnitude_spectrogram(samples, settings)
    if found.shape != magnitude.shape:
        raise InputError(f"magnitude: got shape {tuple(magnitude.shape)}, the samples' is {tuple(found.shape)}")
    wanted = magnitude.float()
    return float(20 * torch.log10((found - wanted).norm() / wanted.norm()))


def _checked(samples: Tensor, settings: MelSettings, rate: int | None) -> Tensor:
    if rate is not None and rate != settings.rate:
        raise InputError(f"rate: got samples at {rate} Hz for settings of {settings.rate} Hz; resample them first")
    if samples.dim() < 1 or samples.shape[-1] <= settings.window // 2:
        raise InputError(
            f"samples: got shape {tuple(samples.shape)}, expected more than {settings.window // 2} (half a window)"
        )
    return samples.float()


def _stft(samples: Tensor, settings: MelSettings) -> Tensor:
    window = torch.hann_window(settings.window, device=samples.device)
    flat = samples.reshape(-1, samples.shape[-1])
    found = torch.stft(flat, settings.window, settings.hop, window=window, return_complex=True)
    return found.reshape(*samples.shape[:-1], *found.shape[1:])


def _istft(spectrum: Tensor, settings: MelSettings) -> Tensor:
    window = torch.hann_window(settings.window, device=spectrum.device)
    return torch.istft(spectrum, settings.window, settings.hop, window=window)


def _mel(hertz: Tensor) -> Tensor:
    return torch.where(hertz < 1000, hertz * 0.015, 15 + 27 * (hertz.clamp(min=1) / 1000).log() / _LOG_STEP)


def _hertz(mel: Tensor) -> Tensor:
    return torch.where(mel < 15, mel / 0.015, 1000 * (_LOG_STEP * (mel - 15) / 27).exp())


_LOG_STEP = float(torch.tensor(6.4, dtype=torch.float64).log())
"""Above 1 kHz, 27 mel of Slaney's multiply the frequency by 6.4."""
