"""How many tokens every expert gets, drawn at random."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from layerwright.core.errors import InputError
from layerwright.score.device.shapes import LMShape

__all__ = ["draw_counts"]

_CHUNK = 1 << 20


def draw_counts(shape: LMShape, tokens: int, generator: np.random.Generator, *, skew: float = 0.0) -> NDArray[np.int64]:
    """Tokens of every expert in every block, each token taking `top_k` different experts.

    Uniform choices are drawn by Floyd's method (Bentley and Floyd, 1987): `top_k` draws for a token, whatever the
    number of experts. Skewed ones take the largest of log-weights plus Gumbel noise. At most about 100 MB at a time.

    Args:
        shape: the model.
        tokens: in the stage.
        generator: source of randomness.
        skew: exponent of a Zipf law over the experts, in another order in every block; 0 is uniform.

    Returns:
        ``(blocks with experts, experts)``; every row sums to ``tokens * top_k``.

    Raises:
        InputError: a negative skew.
    """
    if skew < 0:
        raise InputError(f"skew: got {skew}, expected 0 (uniform) or more")
    blocks, experts = len(shape.moe_layers), shape.num_experts
    counts = np.zeros((blocks, experts), dtype=np.int64)
    if not experts or not tokens:
        return counts
    step = max(1, _CHUNK // (blocks * (experts if skew else shape.top_k)))
    weights = np.zeros((blocks, experts))
    if skew:
        ranks = np.log(np.arange(1, experts + 1))
        # The same favourites in every step of a run: the order is no part of the draw.
        fixed = np.random.default_rng(0)
        weights = np.stack([fixed.permutation(-skew * ranks) for _ in range(blocks)])
    for begin in range(0, tokens, step):
        rows = min(step, tokens - begin)
        chosen = (
            _skewed(weights, rows, shape.top_k, generator)
            if skew
            else _uniform(blocks, rows, experts, shape.top_k, generator)
        )
        flat = chosen + experts * np.arange(blocks)[:, None, None]
        counts += np.bincount(flat.ravel(), minlength=blocks * experts).reshape(blocks, experts)
    return counts


def _uniform(blocks: int, tokens: int, experts: int, top_k: int, generator: np.random.Generator) -> NDArray[np.int64]:
    chosen = np.full((blocks, tokens, top_k), -1, dtype=np.int64)
    for place, last in enumerate(range(experts - top_k, experts)):
        drawn = generator.integers(0, last + 1, size=(blocks, tokens))
        taken = (chosen[..., :place] == drawn[..., None]).any(-1)
        chosen[..., place] = np.where(taken, last, drawn)
    return chosen


def _skewed(weights: NDArray[np.float64], tokens: int, top_k: int, generator: np.random.Generator) -> NDArray[np.int64]:
    keys = weights[:, None, :] + generator.gumbel(size=(weights.shape[0], tokens, weights.shape[1]))
    return np.argpartition(-keys, top_k - 1, axis=-1)[..., :top_k]
