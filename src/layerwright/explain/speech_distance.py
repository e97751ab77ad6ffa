"""How far one utterance is from another: in its spectrum, in its voice, and how straight its attention runs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from layerwright.core.errors import InputError

__all__ = ["diagonal_attention", "mel_cepstral_distortion", "mel_cepstrum", "speaker_similarity", "warped_distance"]


def mel_cepstrum(mel: Tensor, coefficients: int = 13) -> Tensor:
    """Cepstrum ``(frames, coefficients)`` of a logarithmic mel spectrum ``(frames, bins)``, without its 0th coefficient.

    ``c_m = (2 / bins) sum_n mel_n cos(pi m (n + 1/2) / bins)``, so that ``mel_n`` is the mean plus the sum of
    ``c_m cos(pi m (n + 1/2) / bins)``.

    Raises:
        InputError: another shape, or not 1 to ``bins - 1`` coefficients.
    """
    if mel.dim() != 2 or not len(mel):
        raise InputError(f"mel: got shape {tuple(mel.shape)}, expected (frames, bins)")
    bins = mel.shape[1]
    if not 1 <= coefficients < bins:
        raise InputError(f"coefficients: got {coefficients}, expected 1 to {bins - 1}")
    places = torch.arange(bins, dtype=torch.float64) + 0.5
    waves = (math.pi / bins * places[:, None] * torch.arange(1, coefficients + 1)).cos()
    return mel.float() @ (2 / bins * waves).to(mel.device, torch.float32)


def mel_cepstral_distortion(a: Tensor, b: Tensor, dtw: bool = True, coefficients: int = 13) -> float:
    """Mean distance of two logarithmic mel spectra in dB, ``(10 / ln 10) sqrt(2 sum (c_a - c_b)^2)`` over frames.

    That is the root mean square difference of the spectra that the cepstra describe, so numbers do not hang on how a
    cosine transform is scaled. Source: Kubichek, 1993.

    Args:
        a, b: natural logarithms of magnitudes, ``(frames, bins)``.
        dtw: the mean over the best path of dynamic time warping; else frame by frame, over as many frames each.
        coefficients: 1 to ``bins - 1``.

    Raises:
        InputError: unequal bins, unequal frames without `dtw`, or see `mel_cepstrum`.
    """
    if a.dim() == b.dim() == 2 and a.shape[1] != b.shape[1]:
        raise InputError(f"mel: got {a.shape[1]} and {b.shape[1]} bins, expected as many")
    first, second = mel_cepstrum(a, coefficients), mel_cepstrum(b, coefficients)
    scale = 10 / math.log(10) * math.sqrt(2)
    if dtw:
        # Differences themselves: |x|^2 - 2 x y + |y|^2 would leave a frame at a distance from itself.
        return scale * warped_distance((first[:, None] - second).square().sum(2).sqrt())
    if len(first) != len(second):
        raise InputError(f"mel: got {len(first)} and {len(second)} frames, expected as many, or dtw=True")
    return scale * float((first - second).square().sum(1).sqrt().mean())


def warped_distance(costs: Tensor) -> float:
    """The mean cost on the path of least cost from one corner of ``(rows, columns)`` to the other.

    A path goes on by a row, a column or both; of equal ones, both. All cells of an anti-diagonal are found at once.
    Source: Sakoe and Chiba, 1978.

    Raises:
        InputError: no table, or an empty one.
    """
    if costs.dim() != 2 or not costs.numel():
        raise InputError(f"costs: got shape {tuple(costs.shape)}, expected (rows, columns), at least one of each")
    rows, columns = costs.shape
    costs = costs.detach().double()
    # Diagonal d holds cells (row, d - row), one place for each row. Cells that are not there cost infinitely much.
    row = torch.arange(rows, device=costs.device)
    column = torch.arange(rows + columns - 1, device=costs.device)[:, None] - row
    there = (column >= 0) & (column < columns)
    skewed = costs[row, column.clamp(0, columns - 1)].masked_fill(~there, math.inf)
    nowhere = costs.new_full((rows + 1,), math.inf)
    # Place 0 stands for the row above the first, so that a shift by a row is a slice.
    total, length = nowhere.clone(), torch.zeros_like(nowhere)
    total[1], length[1] = skewed[0, 0], 1.0
    before, steps_before = nowhere, torch.zeros_like(nowhere)
    for diagonal in skewed[1:]:
        candidates = torch.stack((before[:-1], total[:-1], total[1:]))
        best, which = candidates.min(0)
        steps = torch.stack((steps_before[:-1], length[:-1], length[1:])).gather(0, which[None])[0]
        before, steps_before = total, length
        total, length = torch.cat((nowhere[:1], best + diagonal)), torch.cat((length[:1] * 0, steps + 1))
    return float(total[-1] / length[-1])


def speaker_similarity(embedder: Any, a: Tensor, b: Tensor) -> float:
    """Cosine of what an embedder makes of two mel spectra, -1 to 1.

    Args:
        embedder: has ``embed(mel, mel_lengths) -> (batch, dim)``, as a `layerwright.models.SpeakerClassifier`.
        a, b: ``(frames, bins)``.

    Raises:
        InputError: another shape.
    """
    for mel in (a, b):
        if mel.dim() != 2 or not len(mel):
            raise InputError(f"mel: got shape {tuple(mel.shape)}, expected (frames, bins)")
    with torch.no_grad():
        first, second = (embedder.embed(mel[None], torch.tensor([len(mel)]))[0].float() for mel in (a, b))
    return float(torch.cosine_similarity(first, second, 0))


def diagonal_attention(alignments: Tensor, text_lengths: Tensor, steps: Tensor, width: float = 0.2) -> Tensor:
    """Share of attention that is within `width` of the diagonal, ``(batch,)``, 0 to 1.

    A step t of T and a symbol n of N are within it where ``|(n + 1/2) / N - (t + 1/2) / T| <= width``; even attention over long
    texts has ``2 width - width^2`` there.

    Args:
        alignments: ``(batch, steps, symbols)``.
        text_lengths, steps: real symbols and steps, ``(batch,)``.
        width: above 0.

    Raises:
        InputError: another shape, a length out of range, or a width that is not above 0.
    """
    if alignments.dim() != 3 or width <= 0:
        raise InputError(
            f"alignments, width: got shape {tuple(alignments.shape)}, {width}, expected (batch, steps, symbols), above 0"
        )
    for name, lengths, most in (("text_lengths", text_lengths, 2), ("steps", steps, 1)):
        whole = alignments.shape[most]
        if tuple(lengths.shape) != (len(alignments),) or bool(((lengths < 1) | (lengths > whole)).any()):
            raise InputError(f"{name}: got {lengths.tolist()}, expected {len(alignments)} of 1 to {whole}")
    t, n = (torch.arange(size, device=alignments.device) + 0.5 for size in alignments.shape[1:])
    steps, text_lengths = steps.to(alignments.device), text_lengths.to(alignments.device)
    away = (n[None, None, :] / text_lengths[:, None, None] - t[None, :, None] / steps[:, None, None]).abs()
    inside = (t[None, :] < steps[:, None])[..., None]
    return ((away <= width) * inside * alignments.float()).sum((1, 2)) / steps
