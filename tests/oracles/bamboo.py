"""Slow, obvious forms of masks, smoothing measures and patches."""

from __future__ import annotations

import numpy
import torch
from torch import Tensor


def pairwise_cosine(x: Tensor) -> float:
    """Mean cosine over all pairs of different tokens of ``(tokens, dim)``, pair by pair."""
    values = x.double().numpy()
    found = []
    for i, a in enumerate(values):
        for j, b in enumerate(values):
            if i != j:
                norms = numpy.linalg.norm(a) * numpy.linalg.norm(b)
                found.append(float(a @ b / norms) if norms else 0.0)
    return float(numpy.mean(found))


def parts(x: Tensor) -> tuple[numpy.ndarray, numpy.ndarray]:
    """The token mean as a matrix ``(1/n) 1 1^T X`` and the rest, by products with the projections themselves."""
    values = x.double().numpy()
    n = len(values)
    mean = numpy.ones((n, n)) / n @ values
    return mean, (numpy.eye(n) - numpy.ones((n, n)) / n) @ values


def smoothing_rate(attn: Tensor) -> float:
    """Largest singular value of the centred map ``(n, n)``."""
    n = len(attn)
    center = numpy.eye(n) - numpy.ones((n, n)) / n
    return float(numpy.linalg.svd(center @ attn.double().numpy() @ center, compute_uv=False)[0])


def diagonal_amplitudes(x: Tensor, rows: int, columns: int) -> list[float]:
    """Log amplitudes ``(batch, rows columns, dim)`` at ``(k rows/2m, k columns/2m)`` minus that at 0, by explicit waves."""
    values = x.double().numpy()
    steps = min(rows, columns) // 2
    found = []
    for k in range(steps + 1):
        a, b = round(k / (2 * steps) * rows), round(k / (2 * steps) * columns)
        total = 0.0
        for sample in values:
            for feature in sample.T:
                grid = feature.reshape(rows, columns)
                wave = sum(
                    grid[r, c] * numpy.exp(-2j * numpy.pi * (a * r / rows + b * c / columns))
                    for r in range(rows)
                    for c in range(columns)
                )
                total += abs(wave)
        found.append(numpy.log(total))
    return [float(value - found[0]) for value in found]


def patches(images: Tensor, patch: int) -> Tensor:
    """Pixels of each patch, row by row, channels last, by loops."""
    rows = []
    for image in images:
        own = []
        for top in range(0, image.shape[1], patch):
            for left in range(0, image.shape[2], patch):
                cut = image[:, top : top + patch, left : left + patch]
                own.append(
                    torch.tensor(
                        [float(cut[c, r, k]) for r in range(patch) for k in range(patch) for c in range(len(cut))]
                    )
                )
        rows.append(torch.stack(own))
    return torch.stack(rows)


def masked_loss(images: Tensor, predicted: Tensor, mask: Tensor, patch: int) -> float:
    """Mean squared error over masked patches of pixels normalised within each patch, patch by patch."""
    errors = []
    for sample, pixels in enumerate(patches(images, patch)):
        for place, values in enumerate(pixels):
            if mask[sample, place]:
                own = values.double()
                target = (own - own.mean()) / (own.var() + 1e-6).sqrt()
                errors.append(float((predicted[sample, place].double() - target).square().mean()))
    return sum(errors) / len(errors)
