"""Slow and obvious forms of what speech synthesis for a target voice is made of."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["attention_step", "lstm_step", "mel_triangles", "path_mean", "penalty", "self_interested_gradient"]


def self_interested_gradient(
    gradient: Tensor, is_target: list[bool], target: float, non_target: float, strength: float
) -> Tensor:
    """What reaches the features, sample by sample."""
    rows = []
    for row, own in zip(gradient, is_target, strict=True):
        rows.append(row * strength * (target if own else non_target))
    return torch.stack(rows)


def path_mean(costs: Tensor) -> float:
    """The mean cost on the best path of dynamic time warping, cell by cell; of equal steps both, then down, then along."""
    rows, columns = costs.shape
    best: dict[tuple[int, int], tuple[float, int]] = {}
    for i in range(rows):
        for j in range(columns):
            if i == j == 0:
                best[i, j] = (float(costs[0, 0]), 1)
                continue
            before = [best[cell] for cell in ((i - 1, j - 1), (i - 1, j), (i, j - 1)) if cell in best]
            total, length = min(before, key=lambda one: one[0])
            best[i, j] = (total + float(costs[i, j]), length + 1)
    total, length = best[rows - 1, columns - 1]
    return total / length


def mel_triangles(rate: int, window: int, bins: int, low: float, high: float) -> Tensor:
    """Slaney's filters, one value after the other."""

    def mel(hertz: float) -> float:
        return hertz * 3 / 200 if hertz < 1000 else 15 + math.log(hertz / 1000) / (math.log(6.4) / 27)

    def hertz(mels: float) -> float:
        return mels * 200 / 3 if mels < 15 else 1000 * math.exp((mels - 15) * math.log(6.4) / 27)

    edges = [hertz(mel(low) + (mel(high) - mel(low)) * k / (bins + 1)) for k in range(bins + 2)]
    table = torch.zeros(bins, window // 2 + 1, dtype=torch.float64)
    for k in range(bins):
        left, middle, right = edges[k : k + 3]
        for n in range(window // 2 + 1):
            f = n * rate / window
            height = 0.0
            if left < f <= middle:
                height = (f - left) / (middle - left)
            elif middle < f < right:
                height = (right - f) / (right - middle)
            table[k, n] = height * 2 / (right - left)
    return table


def lstm_step(
    weight_x: Tensor, weight_h: Tensor, bias: Tensor, x: Tensor, h: Tensor, c: Tensor
) -> tuple[Tensor, Tensor]:
    """A step of an LSTM with gates entry, forget, output, candidate, one sample at a time."""
    rows = []
    for xi, hi, ci in zip(x, h, c, strict=True):
        entry, keep, out, candidate = (weight_x @ xi + weight_h @ hi + bias).chunk(4)
        new_c = torch.sigmoid(keep) * ci + torch.sigmoid(entry) * torch.tanh(candidate)
        rows.append((torch.sigmoid(out) * torch.tanh(new_c), new_c))
    return torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])


def attention_step(
    v: Tensor,
    w: Tensor,
    big_v: Tensor,
    u: Tensor,
    filters: Tensor,
    b: Tensor,
    query: Tensor,
    memory: Tensor,
    last: Tensor,
    total: Tensor,
) -> Tensor:
    """Weights over one text without padding: ``e_j = v . tanh(W s + V m_j + U f_j + b)``, symbol by symbol."""
    half = filters.shape[2] // 2
    energies = []
    for j in range(len(memory)):
        f = torch.zeros(filters.shape[0])
        for tap in range(filters.shape[2]):
            place = j + tap - half
            if 0 <= place < len(memory):
                f = f + filters[:, 0, tap] * last[place] + filters[:, 1, tap] * total[place]
        energies.append(v @ torch.tanh(w @ query + big_v @ memory[j] + u @ f + b))
    return torch.stack(energies).softmax(0)


def penalty(alignments: Tensor, text_lengths: list[int], steps: list[int], width: float) -> float:
    """The guided attention loss, step by step and symbol by symbol."""
    total, count = 0.0, 0
    for sample, (texts, said) in enumerate(zip(text_lengths, steps, strict=True)):
        for t in range(said):
            count += 1
            for n in range(texts):
                away = n / texts - t / said
                total += (1 - math.exp(-(away**2) / (2 * width**2))) * float(alignments[sample, t, n])
    return total / count
