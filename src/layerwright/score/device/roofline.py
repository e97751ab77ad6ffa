"""Time of a layer on a processor: whichever of computation and memory takes longer (Williams et al., 2009)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from layerwright.score.device.costs import Work, expert_work
from layerwright.score.device.processors import Energy, Processor
from layerwright.score.device.shapes import LMShape

__all__ = ["crossover", "expert_table", "joules", "seconds", "utilization"]


def seconds(work: Work, processor: Processor) -> Any:
    """``max(flops / peak, bytes / bandwidth)``, both at the processor's efficiency, plus its launch; nothing takes 0.

    Args:
        work: numbers, or arrays of one shape.
        processor: what runs it.

    Returns:
        Seconds, of the shape of `work`.
    """
    flops, size = np.asarray(work.flops, dtype=np.float64), np.asarray(work.bytes, dtype=np.float64)
    slower = np.maximum(flops / processor.peak_flops, size / processor.bandwidth) / processor.efficiency
    time = np.where(slower > 0, slower + processor.launch_seconds, 0.0)
    return float(time) if time.ndim == 0 else time


def expert_table(shape: LMShape, processor: Processor, most: int, *, shards: int = 1) -> NDArray[np.float64]:
    """Seconds of one expert with 0 to `most` tokens: what is tabulated before serving."""
    return np.asarray(seconds(expert_work(shape, np.arange(most + 1), shards=shards), processor))


def crossover(high: Processor, low: Processor) -> float:
    """Operations per byte below which `low` is the faster; infinite where it always is, 0 where it has no more bandwidth.

    Launch times are left out.
    """
    bandwidths = (high.bandwidth * high.efficiency, low.bandwidth * low.efficiency)
    peaks = (high.peak_flops * high.efficiency, low.peak_flops * low.efficiency)
    if bandwidths[1] <= bandwidths[0]:
        return 0.0
    return float("inf") if peaks[1] >= peaks[0] else peaks[1] / bandwidths[0]


def utilization(work: Work, processor: Processor) -> float:
    """Share of the peak operations per second that a layer reaches."""
    time = seconds(work, processor)
    return float(work.flops / time / processor.peak_flops) if time else 0.0


def joules(work: Work, energy: Energy, *, low: bool) -> float:
    """Energy of a layer: its operations, and its bytes on the way to the processor that runs it."""
    per_byte = energy.low_byte_joules if low else energy.high_byte_joules
    return float(work.flops * energy.op_joules + work.bytes * per_byte)
