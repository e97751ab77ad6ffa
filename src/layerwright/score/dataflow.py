"""A streaming accelerator as a model of time: every layer has its own hardware, and all of them work at once."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from layerwright.core.conv_factors import ConvShape
from layerwright.core.errors import InputError

__all__ = ["DataflowModel", "DeviceMapping", "Engine", "Factors", "divisors", "engine"]

BLOCKS = ((512, 72), (1024, 36), (2048, 18), (4096, 9), (8192, 4), (16384, 2), (32768, 1))
"""``(words, bits)`` that one memory block of 36 Kb can be."""
SHALLOW = 64
"""Memories of at most so many words are made of look-up tables, 64 bits each."""


@dataclass(frozen=True, order=True)
class Factors:
    """How many things one layer does at once; each divides what it counts.

    Attributes:
        groups: of its groups.
        inputs, outputs: channels within a group.
        kernel: places of the kernel.
    """

    groups: int = 1
    inputs: int = 1
    outputs: int = 1
    kernel: int = 1

    @property
    def products(self) -> int:
        """Multiply-adds in one cycle."""
        return self.groups * self.inputs * self.outputs * self.kernel


@dataclass(frozen=True)
class Engine:
    """One layer's hardware.

    Attributes:
        factors: what it does at once.
        cycles: for one sample.
        fill: cycles from its first input to its first output.
        dsp, bram, luts: multipliers, memory blocks of 36 Kb and look-up tables.
    """

    factors: Factors
    cycles: int
    fill: int
    dsp: int
    bram: int
    luts: int


@dataclass(frozen=True)
class DeviceMapping:
    """A whole network on a device.

    Attributes:
        engines: of every layer, in order.
        frequency_mhz: of the clock.
    """

    engines: tuple[Engine, ...]
    frequency_mhz: float

    @property
    def factors(self) -> tuple[Factors, ...]:
        """What every layer does at once."""
        return tuple(e.factors for e in self.engines)

    @property
    def cycles(self) -> tuple[int, ...]:
        """Cycles of every layer for one sample."""
        return tuple(e.cycles for e in self.engines)

    @property
    def resources(self) -> dict[str, int]:
        """``dsp``, ``bram`` and ``luts`` of all layers together."""
        return {name: sum(getattr(e, name) for e in self.engines) for name in ("dsp", "bram", "luts")}

    @property
    def throughput(self) -> float:
        """Samples per second once the pipeline is full: that of its slowest layer."""
        return 1e6 * self.frequency_mhz / max(self.cycles)

    @property
    def latency_ms(self) -> float:
        """Milliseconds of one sample: all layers' fills, and the slowest layer."""
        return (sum(e.fill for e in self.engines) + max(self.cycles)) / (1e3 * self.frequency_mhz)


@dataclass(frozen=True)
class DataflowModel:
    """A device that holds one engine for each layer, after the models of streaming accelerators (fpgaConvNet).

    A layer that multiplies ``p = groups * inputs * outputs * kernel`` pairs at once takes ``max(MACs / p, input words
    / (groups * inputs))`` cycles and ``p`` multipliers; its weights lie in one memory of ``weights / p`` words. The
    default is an AMD U250 at 200 MHz.

    Attributes:
        dsp: multipliers.
        bram, uram: memory blocks of 36 and 288 Kb; one of these counts as eight of those.
        luts: look-up tables.
        frequency_mhz: of the clock.
        bits, data_bits: of a weight and of an activation.
        products_per_dsp: multiplications in one multiplier and cycle; 2 packs two of 8 bits.

    Source: Venieris and Bouganis (2016), fpgaConvNet; Yu and Bouganis (2023), Mixed-TD.
    """

    dsp: int = 12_288
    bram: int = 2_688
    uram: int = 1_280
    luts: int = 1_728_000
    frequency_mhz: float = 200.0
    bits: int = 8
    data_bits: int = 8
    products_per_dsp: int = 1

    def __post_init__(self) -> None:
        least = {"dsp": 1, "bram": 0, "uram": 0, "luts": 0, "bits": 1, "data_bits": 1, "products_per_dsp": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise InputError(f"{name}: got {getattr(self, name)}, expected at least {low}")
        if not 0 < self.frequency_mhz < math.inf:
            raise InputError(f"frequency_mhz: got {self.frequency_mhz}, expected a number above 0")

    @property
    def limits(self) -> tuple[int, int, int]:
        """Multipliers, memory blocks of 36 Kb and look-up tables."""
        return self.dsp, self.bram + 8 * self.uram, self.luts

    def map(self, layers: Sequence[ConvShape], names: Sequence[str] = ()) -> DeviceMapping:
        """Share the device among `layers`: the slowest gets its next faster engine until something is used up.

        Each layer's engines are those that no other one beats in multipliers and cycles, over all divisors; so with
        multipliers alone the greedy rule gives the best throughput. O(engines of all layers x log layers).

        Args:
            layers: sizes, in order.
            names: of the layers, for errors.

        Raises:
            InputError: no layers, a size below 1, or a device that cannot hold the smallest engines.
        """
        if not layers:
            raise InputError("layers: got none, expected at least one convolution or linear layer")
        for number, layer in enumerate(layers):
            if min(*layer.in_size, *layer.out_size) < 1:
                name = names[number] if number < len(names) else f"layer {number}"
                raise InputError(f"{name}: its maps are {layer.in_size} and {layer.out_size}; give sizes of at least 1")
        settings = (self.bits, self.data_bits, self.products_per_dsp)
        ladders = [_ladder(layer, *settings) for layer in layers]
        place = [0] * len(layers)
        used = [sum(getattr(ladder[0], name) for ladder in ladders) for name in ("dsp", "bram", "luts")]
        if any(amount > limit for amount, limit in zip(used, self.limits, strict=True)):
            raise InputError(
                f"device: the smallest engines of {len(layers)} layers take {used[0]:,} DSPs, {used[1]:,} memory "
                f"blocks and {used[2]:,} LUTs, it has {', '.join(f'{limit:,}' for limit in self.limits)}"
            )
        queue = [(-ladder[0].cycles, number) for number, ladder in enumerate(ladders)]
        heapq.heapify(queue)
        while True:
            number = queue[0][1]
            ladder, now = ladders[number], place[number]
            if now + 1 == len(ladder):
                break
            old, new = ladder[now], ladder[now + 1]
            after = [used[0] + new.dsp - old.dsp, used[1] + new.bram - old.bram, used[2] + new.luts - old.luts]
            if any(amount > limit for amount, limit in zip(after, self.limits, strict=True)):
                break
            place[number], used = now + 1, after
            heapq.heapreplace(queue, (-new.cycles, number))
        engines = tuple(ladder[now] for ladder, now in zip(ladders, place, strict=True))
        return DeviceMapping(engines, self.frequency_mhz)


@lru_cache(maxsize=65536)
def divisors(number: int) -> tuple[int, ...]:
    """All divisors of `number`, rising.

    Raises:
        InputError: a number below 1.
    """
    if number < 1:
        raise InputError(f"number: got {number}, expected at least 1")
    low = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return tuple(sorted({*low, *(number // d for d in low)}))


def engine(shape: ConvShape, factors: Factors, bits: int = 8, data_bits: int = 8, products_per_dsp: int = 1) -> Engine:
    """The hardware of one layer for given `factors`: its cycles and what it takes."""
    p, stream = factors.products, factors.groups * factors.inputs
    words = shape.in_channels * shape.in_size[0] * shape.in_size[1]
    cycles = max(-(-shape.macs // p), -(-words // stream))
    rows, columns = shape.kernel
    pixels = min((rows - 1) * shape.in_size[1] + columns, shape.in_size[0] * shape.in_size[1])
    weights = _memory(-(-shape.params // p), bits * p)
    lines = (0, 0)
    if rows > 1:
        lines = _memory(-(-shape.in_size[1] * shape.in_channels // stream), data_bits * stream * (rows - 1))
    return Engine(
        factors,
        cycles,
        fill=-(-cycles * pixels // (shape.in_size[0] * shape.in_size[1])),
        dsp=-(-p // products_per_dsp),
        bram=weights[0] + lines[0],
        luts=weights[1] + lines[1],
    )


def _memory(words: int, width: int) -> tuple[int, int]:
    """``(memory blocks, look-up tables)`` of a memory of `words` words of `width` bits, in the best shape of block."""
    if words <= SHALLOW:
        return 0, width * -(-words // SHALLOW)
    return min(-(-words // deep) * -(-width // wide) for deep, wide in BLOCKS), 0


@lru_cache(maxsize=16384)
def _ladder(shape: ConvShape, bits: int, data_bits: int, products_per_dsp: int) -> tuple[Engine, ...]:
    """Engines of one layer that no other beats, from the smallest on: more multipliers, fewer cycles."""
    g, within = shape.groups, (shape.in_channels // shape.groups, shape.out_channels // shape.groups)
    axes = (divisors(g), divisors(within[0]), divisors(within[1]), divisors(shape.kernel[0] * shape.kernel[1]))
    grid = np.stack([axis.ravel() for axis in np.meshgrid(*map(np.array, axes), indexing="ij")], 1)
    products, stream = grid.prod(1), grid[:, 0] * grid[:, 1]
    words = shape.in_channels * shape.in_size[0] * shape.in_size[1]
    cycles = np.maximum(-(-shape.macs // products), -(-words // stream))
    found: list[Engine] = []
    # Of equal multipliers and cycles the narrowest memory: fewer products at once.
    for row in np.lexsort((products, cycles, -(-products // products_per_dsp))).tolist():
        if not found or cycles[row] < found[-1].cycles:
            made = engine(shape, Factors(*grid[row].tolist()), bits, data_bits, products_per_dsp)
            if found and made.dsp == found[-1].dsp:
                continue
            found.append(made)
    return tuple(found)
