"""Devices to run a language model on: processors over one memory, links between devices, energy."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from layerwright.core.errors import InputError, unknown_name

__all__ = ["Device", "Energy", "Layout", "Links", "Processor"]

Layout = Literal["shared", "hetero", "split"]


def _positive(where: str, **values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not (math.isfinite(value) and value > 0):
            raise InputError(f"{where}: {name}: got {value}, expected a number above 0")


def _not_negative(where: str, **values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value >= 0):
            raise InputError(f"{where}: {name}: got {value}, expected 0 or more")


@dataclass(frozen=True)
class Processor:
    """One processor of a device, by its roofline (Williams et al., 2009).

    Attributes:
        name: for tables.
        flops: peak operations per second (a multiply-add is two); None takes `bandwidth` times `op_per_byte`.
        bandwidth: peak bytes per second from its memory.
        op_per_byte: operations per byte at which both peaks meet; None takes `flops` over `bandwidth`.
        efficiency: share of both peaks that is reached, above 0 up to 1.
        launch_seconds: fixed time of every operation.
    """

    name: str
    flops: float | None
    bandwidth: float
    op_per_byte: float | None = None
    efficiency: float = 1.0
    launch_seconds: float = 0.0

    def __post_init__(self) -> None:
        _positive(self.name, bandwidth=self.bandwidth, flops=self.flops, op_per_byte=self.op_per_byte)
        _not_negative(self.name, launch_seconds=self.launch_seconds)
        if not 0 < self.efficiency <= 1:
            raise InputError(f"{self.name}: efficiency: got {self.efficiency}, expected a share above 0 up to 1")
        if self.flops is None and self.op_per_byte is None:
            raise InputError(f"{self.name}: give flops, or op_per_byte to take flops from the bandwidth")
        if self.flops is None:
            object.__setattr__(self, "flops", self.bandwidth * (self.op_per_byte or 0.0))
        if self.op_per_byte is None:
            object.__setattr__(self, "op_per_byte", (self.flops or 0.0) / self.bandwidth)
        if not math.isclose(self.peak_flops, self.bandwidth * self.ridge, rel_tol=0.01):
            raise InputError(
                f"{self.name}: flops {self.flops:g} is not bandwidth {self.bandwidth:g} times op_per_byte "
                f"{self.op_per_byte:g}: leave one of them out"
            )

    @property
    def peak_flops(self) -> float:
        """Peak operations per second, before efficiency."""
        return self.flops or 0.0

    @property
    def ridge(self) -> float:
        """Operations per byte at which both peaks meet."""
        return self.op_per_byte or 0.0


@dataclass(frozen=True)
class Links:
    """Links between devices: bytes per second in one direction, and seconds for one message.

    Attributes:
        bandwidth, latency_seconds: between the devices of a node (half of 900 GB/s, and 3 microseconds).
        node_bandwidth, node_latency_seconds: between nodes (400 GB/s and half a microsecond).
    """

    bandwidth: float = 450e9
    latency_seconds: float = 3e-6
    node_bandwidth: float = 400e9
    node_latency_seconds: float = 0.5e-6

    def __post_init__(self) -> None:
        _positive("links", bandwidth=self.bandwidth, node_bandwidth=self.node_bandwidth)
        _not_negative("links", latency_seconds=self.latency_seconds, node_latency_seconds=self.node_latency_seconds)

    def all_reduce_seconds(self, size_bytes: float, devices: int) -> float:
        """A ring over `devices` in a node: every one sends its part of `size_bytes` 2 (devices - 1) times."""
        if devices < 2 or size_bytes <= 0:
            return 0.0
        return 2 * (devices - 1) * (self.latency_seconds + size_bytes / devices / self.bandwidth)


@dataclass(frozen=True)
class Energy:
    """Joules of one operation, and of one byte on the way to each processor.

    Published results give no such constants, so they have no defaults. An example of the right magnitude: 0.5e-12 per
    operation, 32e-12 per byte to the far processor (4 pJ per bit), 20e-12 per byte to the near one, whose path
    leaves out the interposer.
    """

    op_joules: float
    high_byte_joules: float
    low_byte_joules: float

    def __post_init__(self) -> None:
        _not_negative("energy", **dataclasses.asdict(self))


@dataclass(frozen=True)
class Device:
    """A device with one memory and one or two processors over it.

    Attributes:
        high: the processor with much computation per byte.
        low: the processor with little computation and much bandwidth; None where there is none.
        capacity_bytes: of the memory.
        links: to other devices.
        name, about: for tables.
        layout: `shared`: both processors over the same memory of every device; `hetero`: half of the devices have
            `high` alone, half `low` alone; `split`: half of the devices prefill and half decode.
        spaces: parts of the memory (bundles of banks) that only one processor uses at a time.
        energy: None leaves energy out.
    """

    high: Processor
    low: Processor | None = None
    capacity_bytes: float = 80 * 1024**3
    links: Links = Links()
    name: str = "device"
    about: str = ""
    layout: Layout = "shared"
    spaces: int = 4
    energy: Energy | None = None

    def __post_init__(self) -> None:
        _positive(self.name, capacity_bytes=self.capacity_bytes, spaces=self.spaces)
        if self.layout not in get_args(Layout):
            raise unknown_name("layout", str(self.layout), get_args(Layout), self.name)
        if self.layout == "hetero" and self.low is None:
            raise InputError(f"{self.name}: the layout hetero needs a low processor")

    def with_efficiency(self, high: float, low: float | None = None) -> Device:
        """The same device whose processors reach those shares of their peaks; `low` is that of `high` if left out."""
        near = self.low and dataclasses.replace(self.low, efficiency=high if low is None else low)
        return dataclasses.replace(self, high=dataclasses.replace(self.high, efficiency=high), low=near)

    def without_low(self) -> Device:
        """The same device with its high processor alone."""
        return dataclasses.replace(self, low=None, layout="shared", name=f"{self.name} (high alone)")

    def to_data(self) -> dict[str, Any]:
        """Plain data for YAML and JSON; `presets.device_from_data` reads it."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value is not None}
