from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwright.core.errors import InputError
from layerwright.score.gemm_schedule import ORDERS, Accelerator, Gemm, _traffic, gemm_schedule
from oracles.luc import tile_traffic

SMALL = Accelerator(macs=64, buffer_bytes=2048, bandwidth=8, tile_cycles=4)


@settings(max_examples=60)
@given(
    st.tuples(*[st.integers(1, 9)] * 3),
    st.tuples(*[st.sampled_from((1, 2, 4, 8, 16))] * 3),
    st.sampled_from(ORDERS),
    st.sampled_from(("input", "weight", "output")),
)
def test_traffic_equals_running_the_loops(
    sizes: tuple[int, int, int], tiles: tuple[int, int, int], order: str, operand: str
) -> None:
    tiles = tuple(min(t, s) for t, s in zip(tiles, sizes, strict=True))  # type: ignore[assignment]
    gemm = Gemm("g", *sizes, bits=8, output_bits=8)
    slow = tile_traffic(dict(zip("mkn", sizes, strict=True)), dict(zip("mkn", tiles, strict=True)), order, operand)
    assert _traffic(gemm, operand, tiles, order, False) == slow


def test_the_best_plan_is_no_worse_than_any_plain_tiling() -> None:
    gemm = Gemm("g", 16, 32, 24, bits=8)
    plan = gemm_schedule([gemm], SMALL).plans[0]
    for tiles in itertools.product((1, 4, 16), (1, 8, 32), (1, 8, 24)):
        if 2 * sum(gemm.operand_bytes(name, tiles) for name in ("input", "weight", "output")) > SMALL.buffer_bytes:
            continue
        for order in ORDERS:
            moved = sum(_traffic(gemm, name, tiles, order, False) for name in ("input", "weight", "output"))
            count = math.prod(-(-s // t) for s, t in zip((16, 32, 24), tiles, strict=True))
            cycles = max(16 * 32 * 24 / (64 * 2), moved / 8) + 4 * count
            assert plan.cycles <= cycles + 1e-9
    assert plan.buffer_bytes <= SMALL.buffer_bytes


def test_fewer_bits_more_zeros_and_more_buffer_never_take_longer() -> None:
    def cycles(accelerator: Accelerator = SMALL, **changes: float) -> float:
        return gemm_schedule([Gemm("g", 16, 32, 32, **{"bits": 8, **changes})], accelerator).cycles  # type: ignore[arg-type]

    assert cycles(bits=4) < cycles(bits=8) < cycles(bits=16)
    assert cycles(sparsity=0.5) <= cycles()
    large = Accelerator(macs=64, buffer_bytes=1 << 20, bandwidth=8, tile_cycles=4)
    assert cycles(large) <= cycles()
    # With everything on chip each operand moves once.
    gemm = Gemm("g", 16, 32, 32, bits=8)
    once = sum(gemm.operand_bytes(name) for name in ("input", "weight", "output"))
    assert gemm_schedule([gemm], large).traffic_bytes == once


def test_what_feeds_the_next_stays_on_chip_where_it_pays() -> None:
    def chain(feeds: bool) -> float:
        first = Gemm("up", 8, 16, 32, bits=16, feeds_next=feeds)
        return gemm_schedule([first, Gemm("down", 8, 32, 16, bits=16)], SMALL).traffic_bytes

    assert chain(True) <= chain(False) - 2 * 8 * 32 * 2 + 1e-9


def test_frozen_weights_leave_memory_first_the_largest_before_others() -> None:
    work = [
        Gemm("small", 8, 8, 8, bits=8, frozen=True),
        Gemm("large", 8, 16, 16, bits=8, frozen=True),
        Gemm("trained", 8, 16, 16, bits=8),
    ]
    total = 64 + 256 + 256
    assert gemm_schedule(work, Accelerator(memory_bytes=total)).offloaded == ()
    assert gemm_schedule(work, Accelerator(memory_bytes=total - 1)).offloaded == ("large",)
    assert gemm_schedule(work, Accelerator(memory_bytes=256)).offloaded == ("large", "small")
    with pytest.raises(InputError, match="smaller window"):
        gemm_schedule(work, Accelerator(memory_bytes=255))


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(InputError, match="no products"):
        gemm_schedule([], SMALL)
    with pytest.raises(InputError, match="no tile fits"):
        gemm_schedule([Gemm("g", 4, 4, 4, bits=32)], Accelerator(buffer_bytes=4))
    with pytest.raises(InputError, match="bits"):
        Gemm("g", 1, 1, 1, bits=9)
    with pytest.raises(InputError, match="sparsity"):
        Gemm("g", 1, 1, 1, sparsity=1.0)
    with pytest.raises(InputError, match="sizes"):
        Gemm("g", 0, 1, 1)
    with pytest.raises(InputError, match="macs"):
        Accelerator(macs=0)
