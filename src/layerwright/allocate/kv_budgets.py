"""Tokens of key-value cache for each layer: layers whose attention changes little give to the others."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from layerwright.core.errors import InputError

__all__ = ["kmeans_1d", "kv_budgets"]


def kmeans_1d(values: Sequence[float], groups: int) -> list[int]:
    """The group of each value, numbered by rising centre: the least sum of squared distances to the centres.

    Exact by dynamic programming over the sorted values (Wang and Song, 2011), so that no start is drawn. Equal values
    share a group; there are fewer groups where there are fewer distinct values. Cost: ``groups * n**2`` for n distinct.

    Raises:
        InputError: fewer than one group, no values, or one that is not finite.
    """
    if groups < 1:
        raise InputError(f"groups: got {groups}, expected at least 1")
    array = np.asarray(values, dtype=np.float64)
    if not array.size or not np.isfinite(array).all():
        raise InputError(f"similarity: got {list(values)}, expected finite numbers, one for each layer")
    points, back, count = np.unique(array, return_inverse=True, return_counts=True)
    n, groups = len(points), min(groups, len(points))
    centred = points - points.mean()
    weight, first, second = (np.concatenate([[0.0], np.cumsum(count * centred**power)]) for power in range(3))
    # spread[i, j]: sum of squares of the points i..j-1 about their mean
    mass = weight[None, :] - weight[:, None]
    moment = first[None, :] - first[:, None]
    spread = second[None, :] - second[:, None] - moment**2 / np.where(mass > 0, mass, 1.0)
    spread = np.where(np.arange(n + 1)[:, None] < np.arange(n + 1)[None, :], np.maximum(spread, 0.0), np.inf)
    best = spread[0].copy()
    cuts = []
    for _ in range(groups - 1):
        table = best[:, None] + spread
        cuts.append(table.argmin(axis=0))
        best = table.min(axis=0)
    label, end = np.zeros(n, dtype=np.intp), n
    for group in range(groups - 1, 0, -1):
        start = int(cuts[group - 1][end])
        label[start:end] = group
        end = start
    return [int(group) for group in label[np.ravel(back)]]


def kv_budgets(
    similarity: Sequence[float],
    mean_budget: int,
    p: float = 0.35,
    groups: int = 3,
    min_tokens: int = 5,
    prompt_length: int | None = None,
) -> tuple[int, ...]:
    """Tokens of each layer, ``len(similarity) * mean_budget`` together, by SqueezeAttention (Wang et al., 2024).

    ``similarity`` is the mean cosine of the residual stream before and after each layer's attention. Its values are put
    into `groups`; a layer of the most similar group gets ``p * mean_budget``, and the others share what that frees::

        b_i = mean_budget * (L - p * |G|) / (L - |G|)

    Fractions are rounded down and what is left goes to the least similar layers; budgets outside
    ``min_tokens .. prompt_length`` are clipped, and the others scaled so that the total stays exact. Where all layers
    are alike, all get `mean_budget`. Source: arXiv 2404.04793, algorithm 1.

    Args:
        similarity: one number for each layer, higher where attention changes less.
        mean_budget: tokens of the uniform budget.
        p: share of it that the most similar group keeps, above 0 up to 1 (uniform); 0.3 to 0.4 in the paper.
        groups: clusters, at least 2.
        min_tokens: least budget of a layer: the sinks and one more.
        prompt_length: largest budget that makes sense; None is no bound.

    Raises:
        InputError: settings out of their range, or a mean budget outside the bounds.
    """
    if isinstance(p, bool) or not 0 < p <= 1:
        raise InputError(f"p: got {p}, expected a share above 0 and up to 1")
    if groups < 2:
        raise InputError(f"groups: got {groups}, expected at least 2")
    most = math.inf if prompt_length is None else prompt_length
    if isinstance(mean_budget, bool) or not isinstance(mean_budget, int) or not min_tokens <= mean_budget <= most:
        bound = "" if prompt_length is None else f" to {prompt_length} (tokens of the prompt)"
        raise InputError(f"mean_budget: got {mean_budget!r}, expected a whole number from {min_tokens}{bound}")
    labels = kmeans_1d(similarity, groups)
    layers, last = len(labels), max(labels)
    squeezed = [label == last for label in labels]
    if last == 0 or p == 1:
        return (mean_budget,) * layers
    count = sum(squeezed)
    rest = mean_budget * (layers - p * count) / (layers - count)
    wanted = np.array([p * mean_budget if low else rest for low in squeezed])
    return _whole(wanted, layers * mean_budget, min_tokens, most, similarity)


def _whole(
    wanted: np.ndarray[tuple[int], np.dtype[np.float64]],
    total: int,
    least: int,
    most: float,
    similarity: Sequence[float],
) -> tuple[int, ...]:
    """Whole numbers near `wanted` within the bounds, `total` together; the least similar layers are rounded up."""
    clipped = np.clip(wanted, least, most)
    if clipped.sum() != total:
        low, high = 0.0, total / wanted.min()  # at the upper end every layer has the total
        for _ in range(200):
            middle = (low + high) / 2
            if np.clip(middle * wanted, least, most).sum() <= total:
                low = middle
            else:
                high = middle
        clipped = np.clip(low * wanted, least, most)
    found = np.floor(clipped + 1e-9).astype(int)
    order = sorted(range(len(found)), key=lambda i: (similarity[i], i))
    while (left := total - int(found.sum())) > 0:
        room = [i for i in order if found[i] < most and wanted[i] > wanted.min()]
        for i in (room or [i for i in order if found[i] < most])[:left]:
            found[i] += 1
    return tuple(int(tokens) for tokens in found)
