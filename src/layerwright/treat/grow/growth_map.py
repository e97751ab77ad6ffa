"""Which old output each new output repeats, and what that does to the weights around it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from layerwright.core.errors import InputError

__all__ = ["GrowthMap", "growth_map", "widen_consumer", "widen_producer", "with_noise"]


@dataclass(frozen=True)
class GrowthMap:
    """A map ``G`` from new outputs to old ones.

    Attributes:
        indices: ``G(j)`` of every new output ``(new width,)``; the first ``width`` of them are ``0, 1, ...``, unless the
            map was `extended`.
        counts: how often each old output occurs ``(width,)``, at least 1.

    Raises:
        InputError: indices and counts that do not belong together.
    """

    indices: Tensor
    counts: Tensor

    def __post_init__(self) -> None:
        if not torch.equal(torch.bincount(self.indices, minlength=len(self.counts)), self.counts):
            raise InputError("counts: expected how often each output occurs in the indices")
        if not bool((self.counts > 0).all()):
            raise InputError("indices: some output occurs nowhere, so the function would change")

    @classmethod
    def of(cls, indices: Tensor) -> GrowthMap:
        """The map with these `indices`."""
        return cls(indices, torch.bincount(indices))

    @property
    def width(self) -> int:
        """Number of outputs before."""
        return len(self.counts)

    @property
    def new_width(self) -> int:
        """Number of outputs after."""
        return len(self.indices)

    def scales(self) -> Tensor:
        """``1 / c(G(j))`` of every new output, float64."""
        return self.counts.double().reciprocal()[self.indices]

    def extended(self, before: int, after: int) -> GrowthMap:
        """The map over a concatenation, with `before` and `after` other channels that stay single."""
        head = torch.arange(before)
        tail = torch.arange(before + self.width, before + self.width + after)
        return GrowthMap.of(torch.cat([head, self.indices + before, tail]))

    def repeated(self, positions: int) -> GrowthMap:
        """The map over flattened channels, each of `positions` neighbouring values."""
        return GrowthMap.of((self.indices[:, None] * positions + torch.arange(positions)).flatten())


def growth_map(width: int, new_width: int, generator: torch.Generator | None = None) -> GrowthMap:
    """The identity on `width` outputs, then `new_width` - `width` of them drawn uniformly, with repetition.

    Without `generator` the draw is that of seed 0.

    Raises:
        InputError: `new_width` is not larger.

    Source: Chen, Goodfellow and Shlens, Net2Net, 2016.
    """
    if new_width <= width:
        raise InputError(f"new_width: got {new_width}, expected more than the present {width}")
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    drawn = torch.randint(width, (new_width - width,), generator=generator, device=generator.device).cpu()
    return GrowthMap.of(torch.cat([torch.arange(width), drawn]))


def widen_producer(
    weight: Tensor,
    growth: GrowthMap,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """``W'[j] = W[G(j)]`` for a weight ``(out, ...)`` or a vector ``(out,)``.

    Args:
        weight: any tensor whose first axis is the layer's outputs.
        growth: the map of that axis.
        noise: standard deviation of what is added to the new outputs alone, as a share of that of the weight.
        generator: of the noise; seed 0 if left out.
    """
    wider = weight.index_select(0, growth.indices.to(weight.device))
    if noise:
        old = growth.width
        spread = noise * weight.float().std(correction=0)
        wider[old:] = with_noise(wider[old:], spread, generator)
    return wider


def widen_consumer(weight: Tensor, growth: GrowthMap, offset: int = 0, positions: int = 1) -> Tensor:
    """``W'[:, j] = W[:, G(j)] / c(G(j))`` for a weight ``(out, in, ...)`` that reads the wider outputs.

    Args:
        weight: of the reader; convolutions keep all their taps.
        growth: the map of the outputs.
        offset: channels in front of them in the reader's input (a concatenation).
        positions: values of each channel in a flattened input.
    """
    own = growth.extended(offset, weight.shape[1] // positions - offset - growth.width).repeated(positions)
    scales = own.scales().to(weight.device)
    columns = weight.index_select(1, own.indices.to(weight.device))
    # In float64 so that the quotients are rounded once.
    return (columns.double() * scales.view(1, -1, *[1] * (weight.dim() - 2))).to(weight.dtype)


def with_noise(values: Tensor, spread: Tensor | float, generator: torch.Generator | None) -> Tensor:
    """`values` and normal noise of standard deviation `spread`, drawn on the processor in float32."""
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    drawn = torch.randn(values.shape, generator=generator, device=generator.device)
    return values + (drawn.to(values.device) * spread).to(values.dtype)
