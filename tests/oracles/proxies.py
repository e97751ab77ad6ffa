"""Proxies and rank correlations the slow, obvious way."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from layerwright.core.calibration import Calibration
from layerwright.core.layer import LayerRef
from layerwright.core.layers import list_layers, treatable
from layerwright.score.proxies.statistics import LayerStatistics

__all__ = ["best_vector", "made_up", "rank_correlation", "two_layers"]


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rho by counting: average ranks, then Pearson's formula."""

    def ranks(values: Sequence[float]) -> list[float]:
        return [sum(v < x for v in values) + (sum(v == x for v in values) + 1) / 2 for x in values]

    x, y = ranks(a), ranks(b)
    mx, my = sum(x) / len(x), sum(y) / len(y)
    top = sum((p - mx) * (q - my) for p, q in zip(x, y, strict=True))
    return top / math.sqrt(sum((p - mx) ** 2 for p in x) * sum((q - my) ** 2 for q in y))


def best_vector(gains: Sequence[Sequence[float]], costs: Sequence[Sequence[float]], limit: float) -> float:
    """The best summed gain of all vectors of choices under a limit."""
    found = -math.inf
    for vector in itertools.product(range(len(gains[0])), repeat=len(gains)):
        if sum(costs[i][c] for i, c in enumerate(vector)) <= limit:
            found = max(found, sum(gains[i][c] for i, c in enumerate(vector)))
    return found


def made_up(layers: int = 6, seed: int = 0, names: str = "AGWHV") -> LayerStatistics:
    """Random statistics of layers whose scale differs."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(4 + i, 6) for i in range(layers)]

    def draw(i: int) -> Tensor:
        return torch.randn(shapes[i], generator=generator) * (1 + i) / 4

    lists = {name: tuple(draw(i) for i in range(layers)) for name in names}
    numel = tuple(a * b for a, b in shapes)
    return LayerStatistics(tuple(f"layer{i}" for i in range(layers)), numel, (1,) * layers, lists)


def two_layers(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Calibration, tuple[LayerRef, ...]]:
    """``y = W2 W1 x`` on labelled data, with the two middle layers of four that can be treated."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(8, 10, bias=False), nn.Linear(10, 12, bias=False), nn.Linear(12, 8, bias=False), nn.Linear(8, 3)
        ).to(dtype)
        x, y = torch.randn(20, 8, dtype=dtype), torch.randint(3, (20,))
    data = Calibration([(x[:10], y[:10]), (x[10:], y[10:])])
    refs = treatable(model, list_layers(model))
    return model, data, refs
