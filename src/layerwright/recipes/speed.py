"""How fast this machine is at the parts of a run, here and now: each measured for some hundredths of a second."""

from __future__ import annotations

import gc
import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch
from torch import nn

from layerwright.core.layer import LayerRef
from layerwright.core.products import fast_products
from layerwright.core.records import ApplyReport
from layerwright.core.treatment import LowRank, Quantize, Treatments
from layerwright.score.inputs import UnitInputs
from layerwright.score.statistics import InputStatistics
from layerwright.treat.unit import finish_unit, needs_inputs, treat_unit

__all__ = ["Speed", "TreatmentSpeed", "machine_speed", "treatment_kind", "treatment_speed"]

PROBE_INPUTS = 256
PROBE_OUTPUTS = (64, 512)
"""Shapes of the layers that are treated to see how long it takes."""

_STORED_BYTES = 8 << 20


@dataclass(frozen=True)
class Speed:
    """What was measured; all times are wall times on the threads that torch uses.

    Attributes:
        products: floating-point operations per second of a linear layer in the model's dtype, as forwards run it.
        values: values per second that an elementwise operation reads and writes in that dtype.
        moments: multiply-adds per second of ``X^T X`` in float32, counted for the whole square.
        written, read: bytes per second of a tensor file.
        collection: seconds that handing freed memory back takes, once a block.
        record: seconds of one record that is forced to disk, once a layer.
    """

    products: float
    values: float
    moments: float
    written: float
    read: float
    collection: float
    record: float


@dataclass(frozen=True)
class TreatmentSpeed:
    """Seconds of treating one weight ``(out, in)``: ``column * in + weight * out * in``, more for wide inputs.

    Attributes:
        column: seconds per input, whatever the outputs.
        weight: seconds per weight.
        square: seconds per ``out * in**2`` and per ``in**3`` beyond the width that was measured; 0 where a method
            has no such product.
    """

    column: float
    weight: float
    square: float

    def seconds(self, out: int, in_: int) -> float:
        """Of one matrix."""
        wider = max(in_ - PROBE_INPUTS, 0)
        return self.column * in_ + self.weight * out * in_ + self.square * (out + in_) * in_ * wider


@cache
@torch.no_grad()
def machine_speed(dtype: torch.dtype, hidden: int, intermediate: int, rows: int) -> Speed:
    """Measure this machine, in about a second; once for the same arguments in one process.

    Args:
        dtype: of the model.
        hidden, intermediate: widths of a block, in the shapes of whose products the speed is taken (2048 at most).
        rows: tokens of one batch (2048 at most are used).
    """
    rows = max(16, min(rows, 2048))
    narrow, wide = min(max(hidden, 16), 2048), min(max(intermediate, 16), 2048)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, narrow, generator=generator).to(dtype)
    up, down = (nn.Parameter(torch.randn(*s, generator=generator).to(dtype)) for s in ((wide, narrow), (narrow, wide)))
    inner = nn.functional.linear(x, up)

    def multiply() -> None:
        nn.functional.linear(nn.functional.linear(x, up), down)

    width = min(wide, 1024)
    statistics = InputStatistics(width)
    inputs = torch.randn(rows, width, generator=generator).to(dtype)
    with fast_products():
        multiplying, elementwise, summing = _in_turn(
            (
                multiply,
                lambda: (nn.functional.silu(inner), inner * inner),
                lambda: statistics.update(inputs),
            )
        )
    collecting = _once(gc.collect)
    written, read, record = _disk()
    return Speed(
        products=4 * rows * narrow * wide / multiplying,
        values=2 * rows * wide / elementwise,
        moments=rows * width**2 / summing,
        written=written,
        read=read,
        collection=collecting,
        record=record,
    )


def treatment_kind(treatments: Treatments) -> Treatments:
    """`treatments` as they are probed: without what changes the time little, so that few kinds are measured."""
    kind = []
    for t in treatments:
        if isinstance(t, Quantize):
            group = t.group_size if t.group_size != -1 and PROBE_INPUTS % t.group_size == 0 else -1
            # Up to three bits several ranges are tried, see `layerwright.treat.quantize`.
            t = replace(t, bits=3 if t.bits <= 3 else 4, group_size=group, act_bits=None, act_mode="dynamic")
        elif isinstance(t, LowRank):
            t = replace(t, inner=16)
        kind.append(t)
    return tuple(kind)


@cache
def treatment_speed(kind: Treatments) -> TreatmentSpeed:
    """Treat, check and pack small layers of random weights by `kind` (see `treatment_kind`), in tenths of a second."""
    few, many = (_treating(kind, out) for out in PROBE_OUTPUTS)
    weight = max(many - few, 0.0) / ((PROBE_OUTPUTS[1] - PROBE_OUTPUTS[0]) * PROBE_INPUTS)
    column = max(few / PROBE_INPUTS - weight * PROBE_OUTPUTS[0], 0.0)
    cubic = needs_inputs(kind) == "gram" or any(isinstance(t, LowRank) for t in kind)
    return TreatmentSpeed(column, weight, _square(kind) if cubic else 0.0)


def _square(kind: Treatments) -> float:
    """Seconds per ``in**3``: factors, and products of a weight with them, at the speed of a float32 product."""
    a = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    product = _in_turn((lambda: a @ a,), 0.03)[0] / 512**3
    if any(isinstance(t, LowRank) for t in kind):
        return _once(lambda: torch.linalg.svd(a)) / 512**3
    sweeps = 3 if any(isinstance(t, Quantize) and t.bits <= 3 for t in kind) else 1
    return product * (sweeps + 1)


@torch.no_grad()
def _treating(kind: Treatments, out: int) -> float:
    generator = torch.Generator().manual_seed(0)
    ref = LayerRef("0", "linear", "0.weight", (out, PROBE_INPUTS), layout="linear")
    statistics = InputStatistics(PROBE_INPUTS)
    statistics.update(torch.randn(2 * PROBE_INPUTS, PROBE_INPUTS, generator=generator))
    weight = torch.randn(out, PROBE_INPUTS, generator=generator)

    def run() -> None:
        holder = nn.Sequential(nn.Linear(PROBE_INPUTS, out, bias=False, device="meta"))
        holder[0].weight = nn.Parameter(weight, requires_grad=False)
        inputs = UnitInputs({"0": statistics}, {"0": "0"}) if needs_inputs(kind) else UnitInputs()
        finish_unit(holder, treat_unit(holder, [ref], {"0": kind}, inputs, ApplyReport()))

    run()
    return min(_once(run) for _ in range(2))


def _disk() -> tuple[float, float, float]:
    from safetensors.torch import load_file, save_file

    tensor = torch.randn(_STORED_BYTES // 4, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "probe.safetensors"
        writing = _once(lambda: save_file({"x": tensor}, path))
        reading = _once(lambda: torch.isfinite(load_file(path)["x"].sum()))
        (syncing,) = _in_turn((partial(_record, Path(folder) / "probe.jsonl"),), 0.03)
    return _STORED_BYTES / writing, _STORED_BYTES / reading, syncing


def _record(path: Path) -> None:
    with path.open("a") as file:
        file.write("x" * 200)
        file.flush()
        os.fsync(file.fileno())


def _once(run: Callable[[], object]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def _in_turn(runs: Sequence[Callable[[], object]], least: float = 0.45) -> list[float]:
    """Mean seconds of each of `runs`, which take turns for `least` seconds; the slowest turn of each does not count.

    A mean, since what else the machine does slows the run to come as well; in turn, so that it slows all alike.
    """
    for run in runs:
        run()
    times: list[list[float]] = [[] for _ in runs]
    begun = time.perf_counter()
    while len(times[0]) < 3 or time.perf_counter() - begun < least:
        for run, found in zip(runs, times, strict=True):
            found.append(_once(run))
    return [max((sum(found) - max(found)) / (len(found) - 1), math.ulp(1.0)) for found in times]
