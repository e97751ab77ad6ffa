from __future__ import annotations

import dataclasses
import math

import pytest

from layerwright.core.errors import InputError
from layerwright.score.device import Device, Energy, Links, Processor, duplex


def test_flops_come_from_bandwidth_and_op_per_byte() -> None:
    near = Processor("Logic-PIM", None, 13.408e12, op_per_byte=8)
    assert near.peak_flops == pytest.approx(107.264e12)
    assert Processor("xPU", 989.4e12, 3.352e12).ridge == pytest.approx(295.17, rel=1e-4)


def test_the_published_figures_of_a_stack() -> None:
    # 32 modules x 512 multiply-adds x 2 operations x 0.65 GHz, five stacks
    assert duplex().low is not None
    assert duplex().low.peak_flops / 5 == pytest.approx(32 * 512 * 2 * 0.65e9, rel=0.01)
    assert duplex().low.bandwidth == 4 * duplex().high.bandwidth


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"flops": -1.0, "bandwidth": 1.0}, "flops: got -1.0"),
        ({"flops": 1.0, "bandwidth": 0.0}, "bandwidth: got 0.0"),
        ({"flops": None, "bandwidth": 1.0}, "give flops, or op_per_byte"),
        ({"flops": 1.0, "bandwidth": 1.0, "op_per_byte": 3.0}, "leave one of them out"),
        ({"flops": 1.0, "bandwidth": 1.0, "efficiency": 1.5}, "efficiency: got 1.5"),
        ({"flops": 1.0, "bandwidth": math.inf}, "bandwidth: got inf"),
        ({"flops": 1.0, "bandwidth": 1.0, "launch_seconds": -1.0}, "launch_seconds: got -1.0"),
    ],
)
def test_processors_that_cannot_be(settings, message) -> None:
    with pytest.raises(InputError, match=message):
        Processor("p", **settings)


def test_rates_of_links_and_energy_are_not_negative() -> None:
    with pytest.raises(InputError, match="links: bandwidth: got -1"):
        Links(bandwidth=-1.0)
    with pytest.raises(InputError, match="latency_seconds"):
        Links(latency_seconds=-1e-6)
    with pytest.raises(InputError, match="op_joules: got -1"):
        Energy(-1.0, 0.0, 0.0)


def test_all_reduce_is_the_ring() -> None:
    links = Links(bandwidth=100.0, latency_seconds=0.5)
    # 4 devices: 6 hops, each 0.5 s and a quarter of 200 bytes at 100 bytes per second
    assert links.all_reduce_seconds(200.0, 4) == pytest.approx(6 * (0.5 + 0.5))
    assert links.all_reduce_seconds(200.0, 1) == links.all_reduce_seconds(0.0, 4) == 0.0


def test_efficiency_of_both_processors() -> None:
    found = duplex().with_efficiency(0.7, 0.9)
    assert (found.high.efficiency, found.low and found.low.efficiency) == (0.7, 0.9)
    assert duplex().with_efficiency(0.6).low.efficiency == 0.6
    assert duplex().without_low().low is None


def test_hetero_needs_a_low_processor() -> None:
    with pytest.raises(InputError, match="hetero needs a low processor"):
        dataclasses.replace(duplex().without_low(), layout="hetero")
    with pytest.raises(InputError, match=r"unknown layout 'shred'.*did you mean shared"):
        Device(duplex().high, layout="shred")  # type: ignore[arg-type]
