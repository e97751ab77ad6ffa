"""What the layers of a block read on the calibration data: one set of statistics per distinct input."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from layerwright.core.blocks import find_blocks
from layerwright.core.calibration import Calibration, evaluating
from layerwright.core.capture import watch_inputs
from layerwright.core.errors import InputError
from layerwright.core.layer import LayerRef
from layerwright.core.lockstep import Lockstep, Stop
from layerwright.score.statistics import InputStatistics

__all__ = ["UnitInputs", "collect_inputs", "forwards", "units_of", "walk_inputs"]


@dataclass
class UnitInputs:
    """Input statistics of the layers of one block; layers that read the same tensor share one object."""

    of: dict[str, InputStatistics] = field(default_factory=dict)
    leader: dict[str, str] = field(default_factory=dict)

    def groups(self, refs: Sequence[LayerRef]) -> list[list[LayerRef]]:
        """`refs` by shared input, in order; a layer without statistics stands alone."""
        found: dict[str, list[LayerRef]] = {}
        for ref in refs:
            found.setdefault(self.leader.get(ref.path, ref.path), []).append(ref)
        return list(found.values())


def collect_inputs(model: nn.Module, stop: Stop, refs: Sequence[LayerRef], needs: Mapping[str, str]) -> UnitInputs:
    """Run the block of `stop` on every call and gather what `refs` read.

    One forward of the block per call up to the last of `refs`, and one ``X^T X`` per distinct input: query, key and
    value share theirs.

    Args:
        needs: by layer path, ``"gram"``, ``"diagonal"`` or nothing (the layer is left out).

    Raises:
        InputError: an input is not finite; names the layer.
    """
    inputs = UnitInputs()
    wanted = [ref for ref in refs if needs.get(ref.path)]
    if not wanted:
        return inputs
    by_path = {ref.path: ref for ref in wanted}
    gram = {ref.path for ref in wanted if needs[ref.path] == "gram"}
    seen: list[tuple[Tensor, str]] = []

    def join(ref: LayerRef, x: Tensor) -> str:
        """The layer whose statistics stand for this input; this layer itself the first time an input is seen."""
        for other, leader in seen:
            if other is x and inputs.leader.get(ref.path, leader) == leader and _alike(by_path[leader], ref):
                inputs.leader[ref.path] = leader
                return leader
        return inputs.leader.setdefault(ref.path, ref.path)

    def see(ref: LayerRef, x: Tensor, expert: int | None) -> None:
        leader = ref.path if expert is not None else join(ref, x)
        inputs.leader.setdefault(ref.path, leader)
        if leader != ref.path:
            return
        if expert is None:
            seen.append((x, leader))
        if leader not in inputs.of:
            inputs.of[leader] = InputStatistics.for_layer(model, ref, only_diagonal=not _wants_gram(leader))
        inputs.of[leader].update(x, expert=expert)

    def _wants_gram(leader: str) -> bool:
        # Members join after the leader's first update, so any sibling's need decides for the group.
        return bool(gram) if by_path[leader].layout != "conv" else leader in gram

    calls: list[str] = []  # of the layers, in this forward
    enough = 0

    def count(ref: LayerRef, x: Tensor, expert: int | None) -> None:
        see(ref, x, expert)
        calls.append(ref.path)
        if len(calls) == enough:
            raise _EnoughError

    for number, call in enumerate(stop.calls):
        seen.clear()
        calls.clear()
        with watch_inputs(model, wanted, count), suppress(_EnoughError):
            stop.run(call)
        # Each layer ran once: what comes after the last of them is not worth computing again.
        if number == 0 and sorted(calls) == sorted(by_path):
            enough = len(calls)
    seen.clear()
    for path, leader in inputs.leader.items():
        inputs.of[path] = inputs.of[leader]
    for path, statistics in inputs.of.items():
        statistics.check(path)
    return inputs


class _EnoughError(Exception):
    """Every layer of a block has shown its input."""


def _alike(leader: LayerRef, ref: LayerRef) -> bool:
    return "conv" not in (leader.layout, ref.layout) and leader.shape[1] == ref.shape[1] and leader.count == ref.count


def units_of(model: nn.Module, refs: Sequence[LayerRef]) -> dict[str, list[LayerRef]]:
    """The modules to stop at, each with the layers of `refs` it holds: their blocks, or layers outside any block."""
    try:
        blocks = [name for stack in find_blocks(model) for name in stack.names]
    except InputError:
        blocks = []
    units: dict[str, list[LayerRef]] = {}
    for ref in refs:
        inside = next((name for name in blocks if ref.path == name or ref.path.startswith(name + ".")), None)
        units.setdefault(inside or ref.parameter.rpartition(".")[0], []).append(ref)
    return units


def forwards(model: nn.Module, calibration: Calibration) -> list[Callable[[], object]]:
    """One function per batch that runs `model` on it."""
    return [partial(calibration.forward, model, batch) for batch in calibration]


def walk_inputs(
    model: nn.Module, calibration: Calibration, refs: Sequence[LayerRef], needs: Mapping[str, str]
) -> Iterator[tuple[list[LayerRef], UnitInputs]]:
    """Yield ``(layers, their input statistics)`` block by block, with the model as it is.

    Two forwards of each block; memory: one block's statistics and one set of activations.
    """
    units = units_of(model, refs)
    missing = set(units)
    with torch.no_grad(), evaluating(model):
        for stop in Lockstep(model, list(units), forwards(model, calibration)):
            if stop.visit == 0:
                missing.discard(stop.path)
                yield units[stop.path], collect_inputs(model, stop, units[stop.path], needs)
    for path in units:
        if path in missing:
            yield units[path], UnitInputs()
