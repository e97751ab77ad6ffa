from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerwright.score.device import (
    Energy,
    Processor,
    Work,
    crossover,
    duplex,
    expert_table,
    h100,
    joules,
    preset_shape,
    seconds,
    utilization,
)
from oracles.placement import roofline

numbers = st.floats(1.0, 1e15)


@given(numbers, numbers, numbers, numbers, st.floats(0.1, 1.0))
def test_time_is_the_slower_of_both(flops, size, peak, bandwidth, efficiency) -> None:
    processor = Processor("p", peak, bandwidth, efficiency=efficiency)
    assert seconds(Work(flops, size), processor) == pytest.approx(roofline(flops, size, peak, bandwidth) / efficiency)


def test_nothing_takes_no_time_and_a_launch_comes_on_top() -> None:
    processor = Processor("p", 10.0, 5.0, launch_seconds=2.0)
    found = seconds(Work(np.array([0.0, 10.0]), np.array([0.0, 1.0])), processor)
    assert found.tolist() == [0.0, 3.0]


def test_the_crossover_of_duplex_is_32() -> None:
    assert duplex().low is not None
    assert crossover(duplex().high, duplex().low) == pytest.approx(32)
    assert crossover(duplex().high, h100().high) == 0.0
    assert crossover(Processor("a", 1.0, 1.0), Processor("b", 2.0, 2.0)) == float("inf")


@given(st.floats(0.01, 1000))
def test_below_the_crossover_the_low_one_is_faster(ratio) -> None:
    high, low = duplex().high, duplex().low
    assert low is not None
    work = Work(ratio, 1.0)
    if abs(ratio / 32 - 1) > 1e-6:
        assert (seconds(work, low) < seconds(work, high)) == (ratio < crossover(high, low))


def test_table_of_an_expert() -> None:
    shape = preset_shape("mixtral")
    table = expert_table(shape, h100().high, 600, shards=4)
    assert table[0] == 0.0 and (np.diff(table) >= 0).all() and len(table) == 601
    weights = 3 * 4096 * 14336 / 4 * 2
    assert table[1] == pytest.approx(weights / 3.352e12, rel=1e-3)


def test_decode_leaves_the_gpu_idle() -> None:
    # the published figure for attention is below 2.06 %, for experts below 11 %
    from layerwright.score.device import Stage, layer_costs

    rows = {row.kind: row for row in layer_costs(preset_shape("mixtral"), Stage((2048,) * 64))}
    high = h100().high
    assert utilization(Work(rows["attention.decode"].flops, rows["attention.decode"].bytes), high) < 0.0206
    assert utilization(Work(rows["experts"].flops, rows["experts"].bytes), high) < 0.11
    assert utilization(Work(0.0, 0.0), high) == 0.0


def test_energy() -> None:
    energy = Energy(1.0, 10.0, 5.0)
    assert joules(Work(3.0, 2.0), energy, low=False) == 23.0
    assert joules(Work(3.0, 2.0), energy, low=True) == 13.0
