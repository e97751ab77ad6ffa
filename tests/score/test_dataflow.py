from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.oracles.conv_factors import best_throughput
from torch import nn

from layerwright.core.conv_factors import ConvShape
from layerwright.core.errors import InputError
from layerwright.score.conv_shapes import conv_shapes
from layerwright.score.dataflow import DataflowModel, Factors, divisors, engine

SHAPES = [
    ConvShape(4, 6, (3, 3), (1, 1), (8, 8), (8, 8)),
    ConvShape(6, 6, (3, 3), (1, 1), (8, 8), (8, 8), groups=6),
    ConvShape(6, 10, (1, 1), (1, 1), (8, 8), (8, 8)),
]


def small(dsp: int, **more: float) -> DataflowModel:
    return DataflowModel(dsp=dsp, **more)  # type: ignore[arg-type]


@given(st.integers(1, 5000))
def test_divisors(number: int) -> None:
    assert list(divisors(number)) == [d for d in range(1, number + 1) if number % d == 0]


@pytest.mark.parametrize("dsp", [3, 7, 12, 20, 35, 60, 100])
def test_greedy_against_brute_force(dsp: int) -> None:
    mapped = small(dsp).map(SHAPES)
    assert max(mapped.cycles) <= 1.1 * best_throughput(SHAPES, dsp)
    assert mapped.resources["dsp"] <= dsp


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_cycles_fall_with_every_factor(data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from(SHAPES))
    counts = (shape.groups, shape.in_channels // shape.groups, shape.out_channels // shape.groups, 9)
    kernel = shape.kernel[0] * shape.kernel[1]
    axes = [divisors(n) for n in (*counts[:3], kernel)]
    low = [data.draw(st.sampled_from(axis)) for axis in axes]
    high = [data.draw(st.sampled_from([d for d in axis if d >= f])) for axis, f in zip(axes, low, strict=True)]
    slow, fast = engine(shape, Factors(*low)), engine(shape, Factors(*high))
    assert fast.cycles <= slow.cycles
    assert fast.dsp >= slow.dsp
    assert slow.cycles >= shape.macs / Factors(*low).products


def test_the_arithmetic_of_one_engine() -> None:
    shape = ConvShape(8, 16, (3, 3), (1, 1), (10, 10), (10, 10))
    made = engine(shape, Factors(1, 4, 8, 3))
    assert made.cycles == 10 * 10 * 8 * 16 * 9 // 96 == 1200
    assert made.dsp == 96 and engine(shape, Factors(1, 4, 8, 3), products_per_dsp=2).dsp == 48
    # 1152 weights in 12 words of 768 bits: look-up tables; two rows of 20 words of 32 bits each: the same.
    assert (made.bram, made.luts) == (0, 768 + 64)
    assert made.fill == -(-1200 * 23 // 100)
    # One word at a time: 1152 words of 8 bits fit one block, and so do 80 words of 16 bits.
    assert engine(shape, Factors()).bram == 2
    # The input cannot come faster than its words.
    assert engine(ConvShape(64, 1, (1, 1), (1, 1), (4, 4), (4, 4)), Factors(1, 1, 1, 1)).cycles == 1024
    assert engine(ConvShape(1, 64, (1, 1), (1, 1), (4, 4), (4, 4)), Factors(1, 1, 64, 1)).cycles == 16


def test_throughput_and_latency() -> None:
    mapped = DataflowModel(dsp=100, frequency_mhz=100).map(SHAPES)
    assert mapped.throughput == pytest.approx(100e6 / max(mapped.cycles))
    fills = sum(e.fill for e in mapped.engines)
    assert mapped.latency_ms == pytest.approx((fills + max(mapped.cycles)) / 100e3)
    # All multipliers busy in every cycle is the bound.
    assert mapped.throughput <= 100e6 * 100 / sum(shape.macs for shape in SHAPES)


@settings(max_examples=20, deadline=None)
@given(st.integers(3, 200), st.integers(0, 100))
def test_a_larger_device_is_not_slower(dsp: int, more: int) -> None:
    assert max(small(dsp + more).map(SHAPES).cycles) <= max(small(dsp).map(SHAPES).cycles)


def test_memory_and_tables_limit_too() -> None:
    layers = [ConvShape(64, 64, (3, 3), (1, 1), (16, 16), (16, 16))] * 3
    free, tight = small(4096).map(layers), small(4096, bram=36, uram=0).map(layers)
    assert tight.resources["bram"] <= 36 < free.resources["bram"] or max(tight.cycles) >= max(free.cycles)
    assert small(4096, luts=100).map(layers).resources["luts"] <= 100


def test_bad_input() -> None:
    with pytest.raises(InputError, match="got none"):
        small(10).map([])
    with pytest.raises(InputError, match="smallest engines"):
        small(2).map(SHAPES)
    with pytest.raises(InputError, match="dsp: got 0"):
        small(0)
    with pytest.raises(InputError, match="frequency"):
        DataflowModel(frequency_mhz=float("nan"))
    with pytest.raises(InputError, match=r"conv3: its maps"):
        small(10).map([ConvShape(3, 4, (3, 3), (1, 1), (2, 2), (0, 0))], ["conv3"])


def test_shapes_of_a_model() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, (3, 5), (2, 1), (1, 2)), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4), nn.Flatten(), nn.Linear(96, 5)
    )
    shapes = conv_shapes(model, lambda: model(torch.zeros(2, 3, 10, 6)))
    assert list(shapes) == ["0", "2", "4"]
    assert shapes["0"] == ConvShape(3, 8, (3, 5), (2, 1), (10, 6), (5, 6))
    assert shapes["2"] == ConvShape(8, 8, (3, 3), (1, 1), (5, 6), (3, 4), groups=4)
    assert shapes["4"].macs == 96 * 5
    unused = nn.ModuleDict({"used": nn.Linear(4, 4), "unused": nn.Conv2d(3, 3, 3)})
    with pytest.raises(InputError, match="unused: the data never reaches it"):
        conv_shapes(unused, lambda: unused["used"](torch.zeros(1, 4)), ["unused"])
    tokens = conv_shapes(unused, lambda: unused["used"](torch.zeros(2, 7, 4)))
    assert tokens["used"].macs == 7 * 16
