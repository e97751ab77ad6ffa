"""Distances of utterances."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from layerwright.explain.speech_distance import (
    diagonal_attention,
    mel_cepstral_distortion,
    mel_cepstrum,
    speaker_similarity,
    warped_distance,
)
from oracles.tdass import path_mean


def mel(frames: int = 20, seed: int = 0) -> Tensor:
    return torch.randn(frames, 40, generator=torch.Generator().manual_seed(seed))


def test_cepstrum_is_the_spectrum() -> None:
    whole = mel(5)
    waves = torch.stack([(math.pi * m * (torch.arange(40) + 0.5) / 40).cos() for m in range(1, 40)])
    assert torch.allclose(mel_cepstrum(whole, 39) @ waves + whole.mean(1, keepdim=True), whole, atol=1e-4)
    assert mel_cepstrum(whole).shape == (5, 13)
    assert torch.allclose(mel_cepstrum(whole + 3), mel_cepstrum(whole), atol=1e-5)  # loudness is no distance


@pytest.mark.parametrize("order", [1, 5, 13])
def test_distortion_in_db(order: int) -> None:
    """A ripple of 0.5 in the logarithm is one of ``20 / ln 10 * 0.5`` dB at its peak, and 1/sqrt(2) of that on average."""
    ripple = 0.5 * (math.pi * order * (torch.arange(40) + 0.5) / 40).cos()
    wanted = 20 / math.log(10) * 0.5 / math.sqrt(2)
    assert mel_cepstral_distortion(mel(), mel() + ripple, dtw=False) == pytest.approx(wanted, rel=1e-4)
    assert mel_cepstral_distortion(mel(), mel() + ripple) <= wanted * (1 + 1e-4)
    beyond = 0.5 * (math.pi * 20 * (torch.arange(40) + 0.5) / 40).cos()  # finer than 13 coefficients see
    assert mel_cepstral_distortion(mel(), mel() + beyond, dtw=False) == pytest.approx(0, abs=1e-4)


def test_itself_and_repetition() -> None:
    assert mel_cepstral_distortion(mel(), mel()) == 0 == mel_cepstral_distortion(mel(), mel(), dtw=False)
    for times in (2, 3):
        assert mel_cepstral_distortion(mel(), mel().repeat_interleave(times, 0)) == 0
        assert mel_cepstral_distortion(mel().repeat_interleave(times, 0), mel()) == 0
    uneven = mel().repeat_interleave(torch.arange(20) % 3 + 1, 0)
    assert mel_cepstral_distortion(uneven, mel()) == 0
    one, other = mel(20, 1), mel(25, 2)
    assert mel_cepstral_distortion(one, other) > 5
    assert mel_cepstral_distortion(one, other) == pytest.approx(mel_cepstral_distortion(other, one), rel=0.05)
    assert mel_cepstral_distortion(one.bfloat16(), other.bfloat16()) == pytest.approx(
        mel_cepstral_distortion(one, other), rel=0.02
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 1000), st.booleans())
def test_warping_is_the_slow_one(rows: int, columns: int, seed: int, ties: bool) -> None:
    costs = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    costs = (costs * 3).round() if ties else costs
    assert warped_distance(costs) == pytest.approx(path_mean(costs), abs=1e-12)


def test_similarity() -> None:
    class Mean:
        def embed(self, x: Tensor, lengths: Tensor) -> Tensor:
            return x[:, : int(lengths[0])].mean(1)

    a = mel()
    assert speaker_similarity(Mean(), a, a) == pytest.approx(1, abs=1e-6)
    assert speaker_similarity(Mean(), a, -2 * a) == pytest.approx(-1, abs=1e-6)
    wanted = float(torch.cosine_similarity(a.mean(0), mel(9, 4).mean(0), 0))
    assert speaker_similarity(Mean(), a, mel(9, 4)) == pytest.approx(wanted, abs=1e-6)


def test_diagonal() -> None:
    straight = torch.eye(10)[None]
    whole = torch.tensor([10])
    assert float(diagonal_attention(straight, whole, whole)) == 1
    assert float(diagonal_attention(straight.flip(2), whole, whole)) == pytest.approx(0.2, abs=0.01)
    even = torch.full((1, 100, 100), 0.01)
    found = diagonal_attention(even, torch.tensor([100]), torch.tensor([100]))
    assert float(found) == pytest.approx(2 * 0.2 - 0.2**2, abs=0.01)
    padded = torch.zeros(2, 12, 15)
    padded[0, :10, :10], padded[1, :12, :6] = torch.eye(10), torch.eye(6).repeat_interleave(2, 0)
    padded[0, 10:, 14] = 1
    found = diagonal_attention(padded, torch.tensor([10, 6]), torch.tensor([10, 12]))
    assert found.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mel_cepstrum(torch.zeros(3)), "mel: got shape"),
        (lambda: mel_cepstrum(torch.zeros(0, 5), 2), "mel: got shape"),
        (lambda: mel_cepstrum(torch.zeros(3, 10)), "coefficients: got 13, expected 1 to 9"),
        (lambda: mel_cepstral_distortion(torch.zeros(3, 40), torch.zeros(3, 80)), "40 and 80 bins"),
        (lambda: mel_cepstral_distortion(torch.zeros(3, 40), torch.zeros(4, 40), dtw=False), "3 and 4 frames"),
        (lambda: warped_distance(torch.zeros(0, 3)), "costs: got shape"),
        (lambda: speaker_similarity(None, torch.zeros(3), torch.zeros(3, 40)), "mel: got shape"),
        (lambda: diagonal_attention(torch.zeros(2, 3), torch.ones(2), torch.ones(2)), "alignments"),
        (lambda: diagonal_attention(torch.zeros(1, 3, 4), torch.tensor([5]), torch.tensor([3])), "text_lengths: got"),
        (lambda: diagonal_attention(torch.zeros(1, 3, 4), torch.tensor([4]), torch.tensor([4])), "steps: got"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
