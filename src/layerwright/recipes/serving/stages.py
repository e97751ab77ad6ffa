"""Time of one stage on many devices, under a policy that says which processor runs what (Duplex: Yun et al., 2024).

Matrices outside the experts are split over the devices of a node; nodes share the requests. Experts are whole on one
device each, or split over all devices of a node as well; nodes share the experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from layerwright.allocate.coprocess import runs_low, split_experts
from layerwright.core.errors import InputError, unknown_name
from layerwright.score.device.costs import Stage, Work, block_work, expert_work, head_work
from layerwright.score.device.processors import Device, Processor
from layerwright.score.device.roofline import expert_table, joules, seconds
from layerwright.score.device.shapes import LMShape

__all__ = ["POLICIES", "ExpertLayout", "StageTime", "StageTimer", "default_policy"]

POLICIES = {
    "gpu": "everything on the high processor",
    "duplex": "decode attention, and experts in stages without a prefill, on the low processor; one works at a time",
    "duplex+pe": "as duplex, with both processors at work on experts and on attention at the same time",
    "duplex+pe+et": "as duplex+pe, with every expert split over all devices of a node",
    "fastest": "each kind of layer on the processor with the smaller roofline time; one works at a time",
    "hetero": "experts on the devices without a high processor, everything else on those with one",
}
"""Policies by name."""

Floats = NDArray[np.float64]
ExpertLayout = Literal["auto", "whole", "tensor"]


def default_policy(device: Device) -> str:
    """The best policy of the paper that a device can follow."""
    if device.layout == "hetero":
        return "hetero"
    return "gpu" if device.low is None else "duplex+pe+et"


@dataclass(frozen=True)
class StageTime:
    """Time of one stage.

    Attributes:
        by_layer: seconds by kind of layer, over all blocks; `attention` is both kinds, `communication` all links.
        high_seconds, low_seconds: that each processor was at work, on the slowest device.
        joules: of all devices; None where the device has no energy constants.
    """

    by_layer: dict[str, float]
    high_seconds: float
    low_seconds: float
    joules: float | None = None

    @property
    def seconds(self) -> float:
        """Of the whole stage."""
        return sum(self.by_layer.values())


class StageTimer:
    """Stage times of a model on `n_devices` devices.

    Args:
        shape, device: model and device.
        n_devices: in all nodes together; must be a multiple of `nodes`, and even in the layout `hetero`.
        policy: of `POLICIES`; without a low processor all of them are alike but for the split of experts.
        nodes: groups of devices with slower links between them.
        by_space: experts in the same part of the memory move together between the processors.
        communication: count the time of the links.
        experts: `whole` holds each expert on one device, `tensor` splits each over the devices of a node; `auto` is
            `tensor` for ``duplex+pe+et`` and `whole` for the others.

    Raises:
        InputError: an unknown policy, one that the layout cannot follow, or numbers of devices that do not divide.
    """

    def __init__(
        self,
        shape: LMShape,
        device: Device,
        n_devices: int = 1,
        policy: str = "duplex+pe+et",
        *,
        nodes: int = 1,
        by_space: bool = False,
        communication: bool = True,
        experts: ExpertLayout = "auto",
    ) -> None:
        if policy not in POLICIES:
            raise unknown_name("policy", policy, POLICIES)
        if experts not in get_args(ExpertLayout):
            raise unknown_name("experts", str(experts), get_args(ExpertLayout))
        if nodes < 1 or n_devices < 1 or n_devices % nodes:
            raise InputError(f"devices: got {n_devices} in {nodes} nodes, expected a multiple of the nodes")
        if (policy == "hetero") != (device.layout == "hetero"):
            raise InputError(f"policy {policy!r} does not go with {device.name}, whose layout is {device.layout}")
        if device.layout == "hetero" and ((n_devices // nodes) % 2 or not shape.num_experts):
            raise InputError(
                f"{device.name} puts experts on half of the devices of a node: got {n_devices // nodes} devices and "
                f"{shape.num_experts} experts, expected an even number and a model with experts"
            )
        self.shape, self.device, self.policy, self.nodes = shape, device, policy, nodes
        self.by_space, self.communication = by_space, communication
        halves = 2 if device.layout == "hetero" else 1
        self.shards = n_devices // nodes // halves
        self._tables: dict[str, Floats] = {}
        whole = experts == "whole" or (experts == "auto" and policy != "duplex+pe+et")
        self._groups = _block_groups(shape)
        self._held, self._expert_shards = _deal(shape, nodes, self.shards, whole=whole)

    def time(self, stage: Stage, counts: NDArray[np.int64]) -> StageTime:
        """Time of `stage` whose experts get `counts` tokens, ``(blocks with experts, experts)``, in all nodes."""
        # The node with the most requests decides.
        local = Stage(stage.decode[:: self.nodes], stage.prefill[:: self.nodes])
        tally = _Tally(self)
        for (moe, windowed), blocks in self._groups.items():
            work = block_work(self.shape, local, moe=moe, windowed=windowed, shards=self.shards)
            tally.attention({kind: work.pop(kind) for kind in list(work) if kind.startswith("attention")}, blocks)
            for kind, one in work.items():
                tally.add(kind, one, blocks, local.kind)
        if self.shape.vocab_size and stage.tokens:
            tally.add("head", head_work(self.shape, local, shards=self.shards), 1, local.kind)
        if len(counts) and stage.tokens:
            tally.experts(counts, stage.kind)
        if self.communication:
            tally.by_layer["communication"] = self._communication(local.tokens)
        return StageTime(tally.by_layer, tally.high, tally.low, tally.joules if self.device.energy else None)

    def table(self, side: str, most: int) -> Floats:
        """Seconds of one expert on a side by its number of tokens; grows as needed."""
        found = self._tables.get(side)
        if found is None or len(found) <= most:
            processor = self.processor(side)
            found = expert_table(self.shape, processor, max(2 * most, 64), shards=self._expert_shards)
            self._tables[side] = found
        return found

    def processor(self, side: str) -> Processor:
        """The processor of a side; the high one where there is no low one."""
        return self.device.low if side == "low" and self.device.low is not None else self.device.high

    def dealt(self, counts: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens of the experts that each device holds: ``(blocks, nodes, groups of devices, experts held)``."""
        padded = np.concatenate([counts, np.zeros((len(counts), 1), dtype=counts.dtype)], -1)
        return padded[:, self._held]

    @property
    def expert_shards(self) -> int:
        """Devices that share one expert."""
        return self._expert_shards

    def low_experts(self, counts: NDArray[np.int64], stage: str) -> NDArray[np.bool_]:
        """Which experts of every block run on the low processor, ``(blocks, experts)``.

        Args:
            counts: their tokens.
            stage: as in `Stage.kind`.
        """
        tally = _Tally(self)
        on_devices = tally.experts(counts, stage)
        chosen = np.zeros((len(counts), self.shape.num_experts + 1), dtype=bool)
        chosen[:, self._held.ravel()] = on_devices.reshape(len(counts), -1)
        return chosen[:, :-1]

    def _communication(self, tokens: int) -> float:
        """All-reduces after attention and after the feed-forward layer of every block, and what crosses nodes."""
        links, blocks, moe = self.device.links, self.shape.layers, len(self.shape.moe_layers)
        size = tokens * self.shape.hidden_size * self.shape.bytes_per_element
        total = 2 * blocks * links.all_reduce_seconds(size, self.shards)
        if self.device.layout == "hetero" and size:
            total += 2 * moe * (links.latency_seconds + size / self.shards / links.bandwidth)
        if self.nodes > 1 and size:
            sent = size * self.shape.top_k * (1 - 1 / self.nodes) / self.shards
            total += 2 * moe * (links.node_latency_seconds + sent / links.node_bandwidth)
        return total


class _Tally:
    """Sums over the layers of one stage."""

    def __init__(self, timer: StageTimer) -> None:
        self.timer = timer
        self.by_layer: dict[str, float] = {}
        self.high = self.low = self.joules = 0.0

    def add(self, kind: str, work: Work, blocks: int, stage: str) -> None:
        """One layer of each of `blocks` blocks, on the processor that the policy names."""
        low = self._chooses_low(kind, work, stage)
        time = blocks * seconds(work, self.timer.processor("low" if low else "high"))
        self._spend(kind, time, 0.0 if low else time, time if low else 0.0)
        self._burn(work, blocks * self.timer.shards * self.timer.nodes, low=low)

    def attention(self, work: dict[str, Work], blocks: int) -> None:
        """Attention of prefilling and of decoding requests: one after the other, or at the same time."""
        stage = "mixed" if len(work) > 1 else "decode"
        times = {"high": 0.0, "low": 0.0}
        for kind, one in work.items():
            low = self._chooses_low(kind, one, stage)
            times["low" if low else "high"] += blocks * seconds(one, self.timer.processor("low" if low else "high"))
            self._burn(one, blocks * self.timer.shards * self.timer.nodes, low=low)
        together = self.timer.policy in ("duplex+pe", "duplex+pe+et") and self.timer.device.low is not None
        total = max(times.values()) if together else sum(times.values())
        self._spend("attention", total, times["high"], times["low"])

    def experts(self, counts: NDArray[np.int64], stage: str) -> NDArray[np.bool_]:
        """All experts of all blocks; the slowest device of each block decides. Returns which of the dealt are low."""
        timer = self.timer
        dealt = timer.dealt(counts)
        most = int(dealt.max())
        tables = {side: timer.table(side, most) for side in ("high", "low")}
        if timer.policy in ("duplex+pe", "duplex+pe+et") and timer.device.low is not None:
            spaces = timer.device.spaces if timer.by_space else None
            split = split_experts(dealt, tables["high"], tables["low"], spaces=spaces)
            low_mask, low, high, total = split.low, split.low_seconds, split.high_seconds, split.time
        else:
            sums = {side: tables[side][dealt].sum(-1) for side in tables}
            chosen = self._experts_low(sums, stage)
            low, high = np.where(chosen, sums["low"], 0.0), np.where(chosen, 0.0, sums["high"])
            low_mask, total = np.broadcast_to(chosen[..., None], dealt.shape), low + high
        flat = [values.reshape(len(dealt), -1) for values in (total, high, low)]
        slowest = flat[0].argmax(-1)[:, None]
        spent = [float(np.take_along_axis(values, slowest, -1).sum()) for values in flat]
        self._spend("experts", *spent)
        if timer.device.energy:
            work = expert_work(timer.shape, dealt, shards=timer.expert_shards)
            for side in (False, True):
                mine = Work(work.flops[low_mask == side].sum(), work.bytes[low_mask == side].sum())
                self._burn(mine, timer.expert_shards, low=side)
        return low_mask

    def _experts_low(self, sums: dict[str, Floats], stage: str) -> NDArray[np.bool_]:
        timer = self.timer
        if timer.policy == "fastest" and timer.device.low is not None:
            # One processor works at a time on all devices, so that the choice is by block.
            slowest = {side: values.max(axis=(1, 2), keepdims=True) for side, values in sums.items()}
            return np.broadcast_to(slowest["low"] < slowest["high"], sums["low"].shape)
        low = timer.policy == "hetero" or (timer.policy != "gpu" and runs_low("experts", stage))
        return np.full(sums["low"].shape, low and timer.device.low is not None)

    def _chooses_low(self, kind: str, work: Work, stage: str) -> bool:
        timer = self.timer
        if timer.device.low is None or timer.policy in ("gpu", "hetero"):
            return False
        if timer.policy == "fastest":
            return bool(seconds(work, timer.device.low) < seconds(work, timer.device.high))
        return runs_low(kind, stage)

    def _spend(self, kind: str, total: float, high: float, low: float) -> None:
        self.by_layer[kind] = self.by_layer.get(kind, 0.0) + total
        self.high += high
        self.low += low

    def _burn(self, work: Work, times: int, *, low: bool) -> None:
        if self.timer.device.energy is not None:
            self.joules += times * joules(work, self.timer.device.energy, low=low)


def _block_groups(shape: LMShape) -> dict[tuple[bool, bool], int]:
    """How many blocks there are with and without experts, with and without a window."""
    moe, windowed = frozenset(shape.moe_layers), frozenset(shape.windowed_layers)
    groups: dict[tuple[bool, bool], int] = {}
    for layer in range(shape.layers):
        key = (layer in moe, layer in windowed)
        groups[key] = groups.get(key, 0) + 1
    return groups


def _deal(shape: LMShape, nodes: int, devices: int, *, whole: bool) -> tuple[NDArray[np.intp], int]:
    """Which experts every device holds, and over how many devices one expert is split.

    Returns:
        Experts by ``(nodes, groups of devices, experts held)``; the number of experts stands for none.
        The devices of a group.
    """
    experts = shape.num_experts
    per_node = -(-experts // nodes)
    groups = min(devices, max(per_node, 1)) if whole else 1
    held = -(-per_node // groups)
    place: Any = np.arange(nodes)[:, None, None] + nodes * (
        np.arange(groups)[:, None] + groups * np.arange(held)[None, :]
    )
    return np.where(place < experts, place, experts).astype(np.intp), max(devices // groups, 1)
