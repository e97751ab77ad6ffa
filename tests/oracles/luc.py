"""Slow forms of EDGE-LLM's rules, of voting and of tile traffic."""

from __future__ import annotations

import itertools
import math

__all__ = ["linear_sparsity", "tile_traffic", "voted"]


def linear_sparsity(sensitivity: list[float], mean: float, most: float) -> list[float]:
    """The linear rule with a cut, by bisection on the factor of ``u`` instead of handing the rest on."""
    low, high = min(sensitivity), max(sensitivity)
    if low == high:
        return [mean] * len(sensitivity)
    weights = [1 - (value - low) / (high - low) for value in sensitivity]
    small, large = 0.0, 1e9
    for _ in range(300):
        factor = math.sqrt(small * large) if small > 0 else large / 2
        factor = (small + large) / 2 if not 0 < factor < large else factor
        total = sum(min(most, factor * u) for u in weights)
        small, large = (small, factor) if total >= mean * len(weights) else (factor, large)
    return [min(most, large * u) for u in weights]


def voted(probabilities: list[list[float]]) -> list[float]:
    """The largest of each entry over the exits, divided by the sum."""
    best = [max(row[i] for row in probabilities) for i in range(len(probabilities[0]))]
    return [value / sum(best) for value in best]


def tile_traffic(sizes: dict[str, int], tiles: dict[str, int], order: str, operand: str) -> int:
    """Elements of `operand` that move when the loops run one by one with one tile of it on chip."""
    own = {"input": "mk", "weight": "kn", "output": "mn"}[operand]
    held: tuple[int, ...] | None = None
    started: set[tuple[int, ...]] = set()
    moved = 0

    def area(tile: tuple[int, ...]) -> int:
        return math.prod(min(tiles[d], sizes[d] - i * tiles[d]) for d, i in zip(own, tile, strict=True))

    ranges = [range(-(-sizes[d] // tiles[d])) for d in order]
    for places in itertools.product(*ranges):
        at = dict(zip(order, places, strict=True))
        tile = tuple(at[d] for d in own)
        if tile == held:
            continue
        if operand == "output":
            moved += area(held) if held is not None else 0  # written back, finished or not
            moved += area(tile) if tile in started else 0  # partial sums are read again
            started.add(tile)
        else:
            moved += area(tile)
        held = tile
    return moved + (area(held) if operand == "output" and held is not None else 0)
