"""Rank of a random layer's output: how much width a non-linearity fills, as the layer widens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from layerwright.core.errors import InputError, unknown_name
from layerwright.score.rank_ratio import rank_ratio

__all__ = ["ACTIVATIONS", "ExpectedRank", "expected_rank"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": torch.relu,
    "relu6": functional.relu6,
    "leaky_relu": functional.leaky_relu,
    "elu": functional.elu,
    "softplus": functional.softplus,
    "silu": functional.silu,
    "hardswish": functional.hardswish,
}
"""Functions by name."""


@dataclass(frozen=True)
class ExpectedRank:
    """Means over random layers.

    Attributes:
        ratio: rank over width at the tolerance.
        precise_ratio: the same at the precision of the numbers.
        nuclear: nuclear-norm ratio of the outputs less their means.
        deviation: standard deviation of `nuclear` between the layers.
        largest_rank: of any of the layers, at the precision of the numbers.
    """

    ratio: float
    precise_ratio: float
    nuclear: float
    deviation: float
    largest_rank: int


def expected_rank(
    d_in: int,
    d_out: int,
    activation: str = "relu",
    trials: int = 50,
    *,
    layer: Literal["conv1x1", "conv3x3", "bottleneck"] = "conv1x1",
    samples: int | None = None,
    tol: float = 1e-2,
    expand: int = 6,
    seed: int = 0,
) -> ExpectedRank:
    """Mean rank of ``f(W X)`` over `trials` draws of normal weights `W` (variance 1 over the fan-in) and inputs `X`.

    Without an activation the rank is at most `d_in`, and a layer that widens suddenly leaves the rest of its width
    unused. A non-linearity fills it in part, the less so the smaller ``d_in / d_out`` is. Source: Han et al., 2021, arXiv
    2007.00992.

    Args:
        d_in, d_out: channels, at least 1.
        activation: a name in `ACTIVATIONS`.
        trials: at least 1.
        layer: ``conv1x1``, ``conv3x3`` (on maps of 8 x 8), or ``bottleneck``: 1 x 1 to ``expand d_in`` channels and a
            depth-wise 3 x 3, each with the activation behind it, then 1 x 1 to `d_out` without.
        samples: columns of `X`, at least `d_out`; the larger of 2048 and ``4 d_out`` if left out. Maps make it a multiple
            of 64.
        tol: see `layerwright.score.rank_ratio.rank_ratio`.

    Raises:
        InputError: a number outside its range, an unknown name, fewer samples than outputs.
    """
    if min(d_in, d_out, trials, expand) < 1:
        raise InputError(
            f"d_in, d_out, trials, expand: got {d_in}, {d_out}, {trials}, {expand}, expected at least 1 each"
        )
    if activation not in ACTIVATIONS:
        raise unknown_name("activation", activation, ACTIVATIONS)
    if layer not in ("conv1x1", "conv3x3", "bottleneck"):
        raise unknown_name("layer", layer, ("conv1x1", "conv3x3", "bottleneck"))
    count = max(2048, 4 * d_out) if samples is None else samples
    act, draw = ACTIVATIONS[activation], torch.Generator().manual_seed(seed)
    found = []
    for _ in range(trials):
        outputs = _OUTPUTS[layer](d_in, d_out, count, expand, act, draw)
        precise = rank_ratio(outputs, None)
        found.append((rank_ratio(outputs, tol), precise, rank_ratio(outputs, tol, "nuclear", centre=True)))
    table = torch.tensor(found, dtype=torch.float64)
    ratio, precise, nuclear = (float(mean) for mean in table.mean(0))
    return ExpectedRank(
        ratio, precise, nuclear, float(table[:, 2].std(correction=0)), round(float(table[:, 1].max()) * d_out)
    )


def _conv1x1(
    d_in: int, d_out: int, samples: int, _expand: int, act: Callable[[Tensor], Tensor], draw: torch.Generator
) -> Tensor:
    return act(_normal(draw, d_out, d_in) @ torch.randn(d_in, samples, generator=draw))


def _conv3x3(
    d_in: int, d_out: int, samples: int, _expand: int, act: Callable[[Tensor], Tensor], draw: torch.Generator
) -> Tensor:
    maps = functional.conv2d(_maps(d_in, samples, draw), _normal(draw, d_out, d_in, 3, 3), padding=1)
    return act(maps).movedim(1, 0).flatten(1)


def _bottleneck(
    d_in: int, d_out: int, samples: int, expand: int, act: Callable[[Tensor], Tensor], draw: torch.Generator
) -> Tensor:
    inner = expand * d_in
    maps = act(functional.conv2d(_maps(d_in, samples, draw), _normal(draw, inner, d_in, 1, 1)))
    maps = act(functional.conv2d(maps, _normal(draw, inner, 1, 3, 3), padding=1, groups=inner))
    return functional.conv2d(maps, _normal(draw, d_out, inner, 1, 1)).movedim(1, 0).flatten(1)


_OUTPUTS = {"conv1x1": _conv1x1, "conv3x3": _conv3x3, "bottleneck": _bottleneck}


def _maps(channels: int, samples: int, draw: torch.Generator) -> Tensor:
    return torch.randn(-(-samples // 64), channels, 8, 8, generator=draw)


def _normal(draw: torch.Generator, outputs: int, *fan: int) -> Tensor:
    weight = torch.randn(outputs, *fan, generator=draw)
    return weight / weight[0].numel() ** 0.5
