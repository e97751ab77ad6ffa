"""Tiles, loop orders and what stays on chip, for a chain of matrix products on a small accelerator.

The hardware side of EDGE-LLM (Yu et al., 2024): every product of a step has bits and sparsity of its own, and some layers
run without a backward pass. The paper outlines the search; the model of cost here is ours and is exhaustive.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from layerwright.core.errors import InputError

__all__ = ["Accelerator", "Gemm", "GemmPlan", "Schedule", "gemm_schedule"]

ORDERS = tuple("".join(order) for order in itertools.permutations("mkn"))
_DIMENSIONS = {"input": "mk", "weight": "kn", "output": "mn"}


@dataclass(frozen=True)
class Accelerator:
    """A device with one array of multipliers and one buffer.

    Attributes:
        macs: multiply-adds of 16 bits in a cycle; `b` bits run ``16 / b`` times as fast.
        buffer_bytes: on chip.
        bandwidth: bytes from or to memory in a cycle.
        tile_cycles: lost with every tile.
        sparse_efficiency: share of a weight's zeros whose products are skipped, 0 to 1.
        memory_bytes: that weights may take beside the chip; infinite where it does not matter.

    Raises:
        InputError: a number outside its range.
    """

    macs: float = 1024.0
    buffer_bytes: int = 256 * 1024
    bandwidth: float = 64.0
    tile_cycles: float = 16.0
    sparse_efficiency: float = 0.5
    memory_bytes: float = math.inf

    def __post_init__(self) -> None:
        for name in ("macs", "buffer_bytes", "bandwidth", "memory_bytes"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name}: got {getattr(self, name)}, expected a positive number")
        if self.tile_cycles < 0 or not 0 <= self.sparse_efficiency <= 1:
            raise InputError("tile_cycles must be 0 or more, sparse_efficiency from 0 to 1")


@dataclass(frozen=True)
class Gemm:
    """One product ``(m, k) @ (k, n)``.

    Attributes:
        name: for reports.
        m, k, n: tokens, inputs, outputs.
        bits: of weight and input.
        sparsity: share of zeros in the weight; they are neither stored nor, in part, multiplied.
        output_bits: of what is written.
        frozen: whether its weight is not trained.
        feeds_next: whether the next product of the workload reads this output.

    Raises:
        InputError: a number outside its range.
    """

    name: str
    m: int
    k: int
    n: int
    bits: int = 16
    sparsity: float = 0.0
    output_bits: int = 16
    frozen: bool = False
    feeds_next: bool = False

    def __post_init__(self) -> None:
        if min(self.m, self.k, self.n) < 1:
            raise InputError(f"{self.name}: got sizes {(self.m, self.k, self.n)}, expected positive numbers")
        for bits in (self.bits, self.output_bits):
            if bits not in (*range(2, 9), 16, 32):
                raise InputError(f"{self.name}: got {bits} bits, expected 2 to 8, 16 or 32")
        if not 0 <= self.sparsity < 1:
            raise InputError(f"{self.name}: got sparsity {self.sparsity}, expected a share from 0 to below 1")

    def operand_bytes(self, operand: str, sizes: tuple[int, int, int] | None = None) -> float:
        """Bytes of the whole ``input``, ``weight`` or ``output``, or of its tile for `sizes` ``(tm, tk, tn)``."""
        m, k, n = sizes or (self.m, self.k, self.n)
        if operand == "input":
            return m * k * self.bits / 8
        if operand == "weight":
            mask = 1 / 8 if self.sparsity else 0.0  # a bit for each place says where the kept ones stand
            return k * n * (self.bits * (1 - self.sparsity) / 8 + mask)
        return m * n * self.output_bits / 8


@dataclass(frozen=True)
class GemmPlan:
    """How one product runs.

    Attributes:
        gemm: the product.
        tiles: ``(tm, tk, tn)``.
        order: loops from the outermost, such as ``mnk``.
        resident: operands that are whole on chip while it runs.
        cycles: its time.
        traffic_bytes: from and to memory.
        buffer_bytes: that it needs.
    """

    gemm: Gemm
    tiles: tuple[int, int, int]
    order: str
    resident: tuple[str, ...]
    cycles: float
    traffic_bytes: float
    buffer_bytes: float


@dataclass(frozen=True)
class Schedule:
    """A workload's plans in order, and the weights that do not stay in memory (frozen ones first, larger ones first)."""

    plans: tuple[GemmPlan, ...]
    offloaded: tuple[str, ...] = ()

    @property
    def cycles(self) -> float:
        """Of all products, one after the other."""
        return math.fsum(plan.cycles for plan in self.plans)

    @property
    def traffic_bytes(self) -> float:
        """Of all products."""
        return math.fsum(plan.traffic_bytes for plan in self.plans)


def gemm_schedule(workload: Sequence[Gemm], accelerator: Accelerator) -> Schedule:
    """The fastest way to run `workload` on `accelerator`, by trying every tiling.

    For each product all tiles of powers of two (and whole sides), all six loop orders and all sets of operands that are
    kept whole on chip are tried; ``cycles = max(products * (1 - sparsity * efficiency) / throughput(bits),
    bytes / bandwidth) + tiles * tile_cycles``, where an operand's tile is loaded once for each turn of the loops down to
    the innermost one that changes it, and unfinished outputs are written and read again. Tiles are double-buffered and
    must fit. Where a product feeds the next, its output may stay on chip between the two: the best such chain is found
    by dynamic programming. Exact in this model; time ``(log m log k log n) * 48`` per distinct product.

    Raises:
        InputError: no products, a buffer that holds no tile, or weights in training that exceed `memory_bytes`.
    """
    if not workload:
        raise InputError("workload: got no products")
    # by whether the next input is on chip already: cycles so far, traffic so far, plans
    states: dict[bool, tuple[float, float, tuple[GemmPlan, ...]]] = {False: (0.0, 0.0, ())}
    for position, gemm in enumerate(workload):
        keep = (False, True) if gemm.feeds_next and position + 1 < len(workload) else (False,)
        following: dict[bool, tuple[float, float, tuple[GemmPlan, ...]]] = {}
        for on_chip, (cycles, traffic, plans) in states.items():
            for kept in keep:
                plan = _best(gemm, accelerator, on_chip, kept)
                if plan is None:
                    continue
                entry = (cycles + plan.cycles, traffic + plan.traffic_bytes, (*plans, plan))
                if kept not in following or entry[:2] < following[kept][:2]:
                    following[kept] = entry
        if not following:
            raise InputError(
                f"{gemm.name}: no tile fits the buffer of {accelerator.buffer_bytes:,} bytes; give a larger one"
            )
        states = following
    return Schedule(states[False][2], _offloaded(workload, accelerator.memory_bytes))


def _offloaded(workload: Sequence[Gemm], memory_bytes: float) -> tuple[str, ...]:
    sizes = {gemm.name: gemm.operand_bytes("weight") for gemm in workload}
    frozen = [gemm for gemm in workload if gemm.frozen]
    left = math.fsum(sizes.values())
    out: list[str] = []
    for gemm in sorted({g.name: g for g in frozen}.values(), key=lambda g: -sizes[g.name]):
        if left <= memory_bytes:
            break
        left -= sizes[gemm.name]
        out.append(gemm.name)
    if left > memory_bytes:
        raise InputError(
            f"memory_bytes: the weights in training take {left:,.0f} bytes, above {memory_bytes:,.0f}; train a smaller window"
        )
    return tuple(out)


@lru_cache(maxsize=4096)
def _best(gemm: Gemm, accelerator: Accelerator, input_on_chip: bool, keep_output: bool) -> GemmPlan | None:
    """The fastest plan, of equal ones the one with the least traffic and the smallest buffer; None if nothing fits."""
    best: tuple[tuple[float, float, float], GemmPlan] | None = None
    forced = frozenset((("input",) if input_on_chip else ()) + (("output",) if keep_output else ()))
    free = [name for name in _DIMENSIONS if name not in forced]
    choices = [forced | set(some) for count in range(len(free) + 1) for some in itertools.combinations(free, count)]
    for tiles in itertools.product(_sizes(gemm.m), _sizes(gemm.k), _sizes(gemm.n)):
        for resident in choices:
            buffer = _buffer(gemm, tiles, resident)
            if buffer > accelerator.buffer_bytes:
                continue
            for order in ORDERS:
                traffic = math.fsum(
                    0.0 if name in forced else _traffic(gemm, name, tiles, order, name in resident)
                    for name in _DIMENSIONS
                )
                cycles = _cycles(gemm, accelerator, tiles, traffic)
                key = (cycles, traffic, buffer)
                if best is None or key < best[0]:
                    plan = GemmPlan(gemm, tiles, order, tuple(sorted(resident)), cycles, traffic, buffer)
                    best = (key, plan)
    return None if best is None else best[1]


def _sizes(size: int) -> tuple[int, ...]:
    return tuple(sorted({1 << power for power in range(size.bit_length()) if 1 << power < size} | {size}))


def _trips(gemm: Gemm, tiles: tuple[int, int, int]) -> dict[str, int]:
    return {d: -(-size // tile) for d, size, tile in zip("mkn", (gemm.m, gemm.k, gemm.n), tiles, strict=True)}


def _buffer(gemm: Gemm, tiles: tuple[int, int, int], resident: frozenset[str] | set[str]) -> float:
    return math.fsum(
        gemm.operand_bytes(name) if name in resident else 2 * gemm.operand_bytes(name, tiles) for name in _DIMENSIONS
    )


def _traffic(gemm: Gemm, operand: str, tiles: tuple[int, int, int], order: str, resident: bool) -> float:
    """Bytes moved for one operand, its ragged last tiles counted at their true size."""
    whole = gemm.operand_bytes(operand)
    if resident:
        return whole
    trips, own = _trips(gemm, tiles), _DIMENSIONS[operand]
    # Loops of one turn do not move anything; the innermost loop that does and belongs to the operand sets the reuse.
    running = [d for d in order if trips[d] > 1]
    inner = max((place for place, d in enumerate(running) if d in own), default=-1)
    repeats = math.prod(trips[d] for d in running[: inner + 1] if d not in own)
    return whole * (2 * repeats - 1) if operand == "output" else whole * repeats


def _cycles(gemm: Gemm, accelerator: Accelerator, tiles: tuple[int, int, int], traffic: float) -> float:
    products = gemm.m * gemm.k * gemm.n * (1 - gemm.sparsity * accelerator.sparse_efficiency)
    compute = products / (accelerator.macs * 16 / gemm.bits)
    count = math.prod(_trips(gemm, tiles).values())
    return max(compute, traffic / accelerator.bandwidth) + count * accelerator.tile_cycles
