"""What a network of factorised convolutions costs: multiplications, weights, and time by one of three clocks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from layerwright.core.calibration import Calibration
from layerwright.core.conv_factors import ConvShape
from layerwright.core.errors import InputError
from layerwright.score.costs import module_milliseconds
from layerwright.score.dataflow import DataflowModel

__all__ = ["COSTS", "NetworkCost", "StageClock", "TimeOf", "make_time"]

COSTS = ("dataflow", "macs", "measured")

TimeOf = Callable[[Mapping[str, Sequence[ConvShape]]], float]
"""``time(path to the stages that stand there) -> amount``, for all layers of the network in order."""


@dataclass(frozen=True)
class NetworkCost:
    """Prices a network in which some layers are chains.

    Attributes:
        whole: every layer as it is, in order.
        time_of: the clock; None leaves the time out.
    """

    whole: Mapping[str, Sequence[ConvShape]]
    time_of: TimeOf | None

    def amounts(self, changed: Mapping[str, Sequence[ConvShape]]) -> dict[str, float]:
        """``macs``, ``params`` and ``ms``, with the stages of `changed` in the place of those layers."""
        now = {path: changed.get(path, stages) for path, stages in self.whole.items()}
        every = [stage for stages in now.values() for stage in stages]
        found = {"macs": float(sum(s.macs for s in every)), "params": float(sum(s.params for s in every))}
        return found if self.time_of is None else {**found, "ms": self.time_of(now)}


def make_time(
    cost: str,
    model: nn.Module,
    calibration: Calibration,
    shapes: Mapping[str, ConvShape],
    device: Mapping[str, Any] | None = None,
) -> TimeOf:
    """The clock of that name.

    Args:
        cost: ``dataflow``: latency in milliseconds of one sample on a `DataflowModel`; ``macs``: multiply-adds of one
            sample; ``measured``: milliseconds of one forward over a batch on this machine.
        model, calibration: for ``measured``.
        shapes: of all layers.
        device: settings of the `DataflowModel`.

    Raises:
        InputError: an unknown setting of the device.
    """
    if cost == "macs":
        return lambda now: float(sum(stage.macs for stages in now.values() for stage in stages))
    if cost == "measured":
        return StageClock(model, calibration, shapes).milliseconds
    try:
        built = DataflowModel(**dict(device or {}))
    except TypeError as error:
        raise InputError(f"device: {error}; its settings are those of DataflowModel") from error

    def latency(now: Mapping[str, Sequence[ConvShape]]) -> float:
        return built.map([stage for stages in now.values() for stage in stages]).latency_ms

    return latency


class StageClock:
    """Times chains of convolutions on this machine, each distinct one once.

    A chain of random weights runs beside the convolution that it stands for, in turn, so that a busy machine slows
    both; the network's own time is changed by the differences.
    """

    def __init__(
        self, model: nn.Module, calibration: Calibration, shapes: Mapping[str, ConvShape], repeats: int = 5
    ) -> None:
        batch = next(iter(calibration))
        self.shapes, self.repeats = dict(shapes), repeats
        self.samples = max(1, calibration.head(1).samples)
        paths = list(shapes)
        times = module_milliseconds(model, paths, lambda: calibration.forward(model, batch), repeats)
        self.base, self.layers = times[""], {path: times[path] for path in paths}
        self._ratios: dict[tuple[ConvShape, tuple[ConvShape, ...]], float] = {}

    def milliseconds(self, now: Mapping[str, Sequence[ConvShape]]) -> float:
        """Of one forward over the first batch, the chains of `now` in place."""
        changed = 0.0
        for path, stages in now.items():
            key = (self.shapes[path], tuple(stages))
            if key[1] == (key[0],):
                continue
            if key not in self._ratios:
                self._ratios[key] = self._ratio(*key)
            changed += self.layers[path] * (self._ratios[key] - 1)
        return max(self.base + changed, 1e-6)

    @torch.no_grad()
    def _ratio(self, shape: ConvShape, stages: Sequence[ConvShape]) -> float:
        modules = [_conv(shape), nn.Sequential(*(_conv(stage) for stage in stages))]
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.samples, shape.in_channels, *shape.in_size, generator=generator)
        found: list[list[float]] = [[], []]
        for number in range(self.repeats + 1):
            for module, times in zip(modules, found, strict=True):
                begun = time.perf_counter()
                module(x)
                if number:
                    times.append(time.perf_counter() - begun)
        return statistics.median(found[1]) / max(statistics.median(found[0]), 1e-9)


def _conv(shape: ConvShape) -> nn.Conv2d:
    """A convolution of these sizes; padded so that its output has at least the size that is wanted."""
    padding = [
        max(0, -(-((out - 1) * s + k - size) // 2))
        for out, s, k, size in zip(shape.out_size, shape.stride, shape.kernel, shape.in_size, strict=True)
    ]
    return nn.Conv2d(
        shape.in_channels,
        shape.out_channels,
        shape.kernel,
        shape.stride,
        (padding[0], padding[1]),
        groups=shape.groups,
        bias=False,
    )
