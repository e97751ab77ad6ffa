"""One buffer for all intermediate results of a block: who lives when, and where (Li et al., 2021, EET)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from layerwright.core.errors import InputError

__all__ = ["BufferPool", "Interval", "MemoryPlan", "Workspace"]

_ALIGN = 64


@dataclass(frozen=True)
class Interval:
    """A tensor of a trace: `size` bytes, needed from operation `first` to operation `last`, both inclusive."""

    name: str
    size: int
    first: int
    last: int

    def __post_init__(self) -> None:
        if self.size < 0 or not 0 <= self.first <= self.last:
            raise InputError(
                f"interval {self.name!r}: got {self.size} bytes from {self.first} to {self.last}, expected size >= 0 and "
                "0 <= first <= last"
            )

    def meets(self, other: Interval) -> bool:
        """Whether both are needed at some operation."""
        return self.first <= other.last and other.first <= self.last


@dataclass(frozen=True)
class MemoryPlan:
    """Where each tensor lies: offsets in bytes, multiples of 64, and the size of the buffer."""

    offsets: Mapping[str, int]
    size: int
    separate: int
    """What the tensors would take if each had memory of its own."""


class Workspace:
    """A byte buffer and the tensors in it; the same for every block.

    Args:
        plan: from `Workspace.plan`.
        device: where the buffer is.
    """

    def __init__(self, plan: MemoryPlan, device: torch.device | str = "cpu") -> None:
        self.layout = plan
        self.buffer = torch.zeros(plan.size, dtype=torch.uint8, device=device)

    @staticmethod
    def plan(trace: Sequence[Interval]) -> MemoryPlan:
        """Offsets for the tensors of `trace` such that no two that are needed at once overlap.

        The largest comes first; each goes into the smallest gap between its already placed contemporaries that holds
        it, else above them. Peak: never below the largest sum of sizes at one operation.

        Raises:
            InputError: two tensors of one name.
        """
        if len({interval.name for interval in trace}) != len(trace):
            raise InputError("trace: names of tensors must differ")
        placed: list[tuple[int, int, Interval]] = []
        for interval in sorted(trace, key=lambda i: (-i.size, i.first, i.name)):
            taken = sorted((start, stop) for start, stop, other in placed if other.meets(interval))
            start = _best_gap(taken, _aligned(interval.size))
            placed.append((start, start + _aligned(interval.size), interval))
        size = max((stop for _, stop, _ in placed), default=0)
        offsets = {interval.name: start for start, _, interval in placed}
        return MemoryPlan(offsets, size, sum(_aligned(interval.size) for interval in trace))

    @property
    def nbytes(self) -> int:
        """Size of the buffer."""
        return self.buffer.nbytes

    def tensor(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The tensor `name` as a view of the buffer; what it holds is left over from others.

        Raises:
            InputError: not in the plan.
        """
        if name not in self.layout.offsets:
            raise InputError(f"workspace: no tensor {name!r} in the plan; it has {', '.join(self.layout.offsets)}")
        size = dtype.itemsize
        for extent in shape:
            size *= extent
        start = self.layout.offsets[name]
        return self.buffer[start : start + size].view(dtype).view(tuple(shape))


class BufferPool:
    """Buffers that are lent and given back: the first idle one that is large enough, else a new one (EET's manager)."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = device
        self._buffers: list[Tensor] = []
        self._busy: list[bool] = []

    def get(self, size: int) -> Tensor:
        """A uint8 buffer of at least `size` bytes, busy until it is released."""
        for number, buffer in enumerate(self._buffers):
            if not self._busy[number] and buffer.nbytes >= size:
                self._busy[number] = True
                return buffer
        buffer = torch.zeros(size, dtype=torch.uint8, device=self.device)
        self._buffers.append(buffer)
        self._busy.append(True)
        return buffer

    def release(self, buffer: Tensor) -> None:
        """Give a buffer back.

        Raises:
            InputError: it is not lent from this pool.
        """
        for number, own in enumerate(self._buffers):
            if own is buffer and self._busy[number]:
                self._busy[number] = False
                return
        raise InputError("buffer: not lent from this pool, or given back twice")

    @property
    def nbytes(self) -> int:
        """Memory of all buffers."""
        return sum(buffer.nbytes for buffer in self._buffers)

    @staticmethod
    def size_for(trace: Sequence[Interval]) -> int:
        """Bytes that a pool comes to hold when it serves `trace`, operation by operation."""
        pool, lent = BufferPool("meta"), dict[str, Tensor]()
        for number in range(max((interval.last for interval in trace), default=-1) + 1):
            for interval in trace:
                if interval.first == number:
                    lent[interval.name] = pool.get(interval.size)
            for interval in trace:
                if interval.last == number:
                    pool.release(lent.pop(interval.name))
        return pool.nbytes


def _best_gap(taken: Sequence[tuple[int, int]], size: int) -> int:
    """Start of the smallest gap of at least `size` between sorted `taken` intervals; else their end."""
    best, best_size, end = -1, 0, 0
    for start, stop in taken:
        gap = start - end
        if gap >= size and (best < 0 or gap < best_size):
            best, best_size = end, gap
        end = max(end, stop)
    return best if best >= 0 else end


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN
