"""Which part of an elastic network runs, and the parts that may: plain data."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from layerwright.core.errors import InputError

__all__ = ["SubnetConfig", "SubnetSpace"]


@dataclass(frozen=True)
class SubnetConfig:
    """A sub-network: the blocks that run, and the inner width of each one's feed-forward part.

    Attributes:
        keep: indices of the blocks, ascending.
        widths: a width for each of them.

    Raises:
        InputError: no blocks (depth below 1), indices that do not ascend, or not one width for each.
    """

    keep: tuple[int, ...]
    widths: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.keep:
            raise InputError("keep: got no blocks, expected a depth of at least 1")
        if self.keep[0] < 0 or any(a >= b for a, b in itertools.pairwise(self.keep)):
            raise InputError(f"keep: got {self.keep}, expected block indices from 0, ascending")
        if len(self.widths) != len(self.keep):
            raise InputError(f"widths: got {len(self.widths)}, expected one for each of the {len(self.keep)} blocks")

    @property
    def depth(self) -> int:
        """How many blocks run."""
        return len(self.keep)


@dataclass(frozen=True)
class SubnetSpace:
    """The sub-networks that are trained: every choice of that many blocks and of these widths for each.

    Attributes:
        blocks: of the whole network.
        depths: numbers of blocks that may run, from 1 to `blocks`.
        widths: inner widths of feed-forward parts, from 1.

    Raises:
        InputError: an empty axis, a depth or a width outside its range, or one given twice.
    """

    blocks: int
    depths: tuple[int, ...]
    widths: tuple[int, ...]

    def __post_init__(self) -> None:
        for axis, values, top in (("depths", self.depths, self.blocks), ("widths", self.widths, None)):
            if not values or min(values) < 1 or (top is not None and max(values) > top):
                bound = "1 or more" if top is None else f"1 to {top}"
                raise InputError(f"{axis}: got {tuple(values)}, expected numbers of {bound}")
            if len(set(values)) < len(values):
                raise InputError(f"{axis}: got {tuple(values)}, expected each number once")

    def check(self, config: SubnetConfig) -> None:
        """Nothing, if `config` is of this space.

        Raises:
            InputError: it is not; names the axis.
        """
        if config.keep[-1] >= self.blocks:
            raise InputError(f"keep: got block {config.keep[-1]}, expected 0 to {self.blocks - 1}")
        if config.depth not in self.depths:
            raise InputError(f"depth: got {config.depth}, expected one of {sorted(self.depths)}")
        for width in config.widths:
            if width not in self.widths:
                raise InputError(f"widths: got {width}, expected one of {sorted(self.widths)}")

    def max(self) -> SubnetConfig:
        """The largest: most blocks, widest."""
        return self.evenly(max(self.depths), max(self.widths))

    def min(self) -> SubnetConfig:
        """The smallest: fewest blocks, narrowest."""
        return self.evenly(min(self.depths), min(self.widths))

    def evenly(self, depth: int, width: int) -> SubnetConfig:
        """`depth` blocks of the same `width`, spread evenly from the first to the last one.

        Raises:
            InputError: not of this space.
        """
        span = self.blocks - 1
        keep = tuple(round(i * span / (depth - 1)) for i in range(depth)) if depth > 1 else (0,) * depth
        config = SubnetConfig(keep, (width,) * depth)
        self.check(config)
        return config

    def sample(self, generator: torch.Generator) -> SubnetConfig:
        """A random one: a depth, so many of the blocks, and a width for each, all evenly."""
        depth = self.depths[_draw(len(self.depths), generator)]
        keep = sorted(torch.randperm(self.blocks, generator=generator)[:depth].tolist())
        return SubnetConfig(tuple(keep), tuple(self.widths[_draw(len(self.widths), generator)] for _ in keep))

    def __len__(self) -> int:
        return sum(math.comb(self.blocks, depth) * len(self.widths) ** depth for depth in self.depths)

    def __iter__(self) -> Iterator[SubnetConfig]:
        for depth in self.depths:
            for keep in itertools.combinations(range(self.blocks), depth):
                for widths in itertools.product(self.widths, repeat=depth):
                    yield SubnetConfig(keep, widths)


def _draw(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=generator))


def ascending(widths: Sequence[int]) -> tuple[int, ...]:
    """`widths` in order, each at least 1 and there once.

    Raises:
        InputError: they are not.
    """
    SubnetSpace(1, (1,), tuple(widths))
    return tuple(sorted(widths))
