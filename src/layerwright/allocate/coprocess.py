"""Which of a device's two processors runs which layer, and which expert (Duplex: Yun et al., 2024, arXiv 2409.01141)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from layerwright.core.errors import InputError, unknown_name
from layerwright.score.device.costs import CostTable, Work
from layerwright.score.device.processors import Device
from layerwright.score.device.roofline import crossover, seconds

__all__ = ["ExpertSplit", "Placement", "Rule", "op_per_byte_plan", "runs_low", "split_experts"]

Side = Literal["high", "low"]
Rule = Literal["kind", "experts", "fastest"]


@dataclass(frozen=True)
class Placement:
    """Layers and the processor that runs each.

    Attributes:
        layers: name of the layer to `high` or `low`, in order of execution.
        reasons: why, by layer.
        seconds: by layer, on the chosen processor.
        device: name.
        stage: `decode`, `prefill` or `mixed`.
    """

    layers: Mapping[str, Side]
    reasons: Mapping[str, str]
    seconds: Mapping[str, float]
    device: str
    stage: str

    @property
    def total_seconds(self) -> float:
        """Of all layers, one after the other."""
        return sum(self.seconds.values())

    def to_data(self) -> dict[str, Any]:
        """Plain data for YAML and JSON."""
        layers = {
            name: {"processor": side, "microseconds": round(self.seconds[name] * 1e6, 3), "why": self.reasons[name]}
            for name, side in self.layers.items()
        }
        return {"device": self.device, "stage": self.stage, "layers": layers}

    def __str__(self) -> str:
        numbers = Counter(self.layers.values())
        return f"{self.device}, {self.stage}: {numbers['high']} layers high, {numbers['low']} low"


def runs_low(kind: str, stage: str, rule: Rule = "kind") -> bool:
    """Whether a layer of that kind belongs to the low processor, where a rule says so without a look at sizes.

    Args:
        kind: as in `CostTable.kinds`.
        stage: as in `Stage.kind`.
        rule: `kind`: attention of decoding requests always, experts in stages without a prefill; everything else has
            many operations per byte. `experts`: experts always, and nothing else.
    """
    if rule == "experts":
        return kind == "experts"
    return kind == "attention.decode" or (kind == "experts" and stage == "decode")


def op_per_byte_plan(costs: CostTable, device: Device, *, rule: Rule = "kind") -> Placement:
    """The processor of every layer by its operations per byte.

    Args:
        costs: of one stage.
        device: without a low processor everything is high.
        rule: `kind` and `experts` go by the kind of layer, see `runs_low`; `fastest` takes the smaller roofline time
            of each layer.

    Raises:
        InputError: an unknown rule.
    """
    if rule not in get_args(Rule):
        raise unknown_name("rule", str(rule), get_args(Rule))
    work = Work(costs.flops, costs.bytes)
    high = seconds(work, device.high)
    low = seconds(work, device.low) if device.low else np.full(len(costs), np.inf)
    if rule == "fastest":
        chosen = low < high
    else:
        fits = [runs_low(kind, costs.stage.kind, rule) for kind in costs.kinds]
        chosen = np.array(fits, dtype=bool) & (device.low is not None)
    limit = crossover(device.high, device.low) if device.low else 0.0
    times = np.where(chosen, low, high)
    layers: dict[str, Side] = {}
    reasons: dict[str, str] = {}
    for name, kind, ratio, is_low in zip(costs.names, costs.kinds, costs.op_per_byte, chosen, strict=True):
        layers[name] = "low" if is_low else "high"
        side = "below" if ratio < limit else "at or above"
        why = "" if rule == "fastest" else f"{kind} of a {costs.stage.kind} stage; "
        reasons[name] = f"{why}{ratio:.3g} Op/B, {side} the crossover at {limit:.3g}"
    taken = dict(zip(costs.names, (float(time) for time in times), strict=True))
    return Placement(layers, reasons, taken, device.name, costs.stage.kind)


@dataclass(frozen=True)
class ExpertSplit:
    """Experts of one layer, or of many, shared between two processors that work at the same time.

    Attributes:
        low: whether an expert runs on the low processor, ``(..., experts)``.
        low_seconds, high_seconds: time of each processor, ``(...)``.
    """

    low: NDArray[np.bool_]
    low_seconds: NDArray[np.float64]
    high_seconds: NDArray[np.float64]

    @property
    def time(self) -> NDArray[np.float64]:
        """Seconds until both are done, ``(...)``."""
        return np.maximum(self.low_seconds, self.high_seconds)

    @property
    def low_ids(self) -> tuple[int, ...]:
        """Experts of a single layer on the low processor."""
        return self._ids(self.low)

    @property
    def high_ids(self) -> tuple[int, ...]:
        """Experts of a single layer on the high processor."""
        return self._ids(~self.low)

    def _ids(self, chosen: NDArray[np.bool_]) -> tuple[int, ...]:
        if chosen.ndim != 1:
            raise InputError(f"this split has {chosen.ndim} axes, expected the experts of one layer: read `low`")
        return tuple(int(place) for place in np.flatnonzero(chosen))


def split_experts(counts: ArrayLike, t_high: ArrayLike, t_low: ArrayLike, *, spaces: int | None = None) -> ExpertSplit:
    """Share the experts of every layer between two processors: those with the fewest tokens go to the low one.

    The experts are sorted by tokens; all begin on the high processor and move one by one, fewest tokens first. The
    cost of a split is the larger of both sums of times, and the best of all ``experts + 1`` prefixes is kept (the
    shortest of equals). All layers at once, in O(experts log experts) each.

    Args:
        counts: tokens of each expert, ``(..., experts)``; those without tokens take no time anywhere.
        t_high, t_low: seconds of one expert by its number of tokens, from 0 to at least the largest count.
        spaces: None moves experts one by one. A number deals them over that many parts of the memory in turn, and
            moves all experts of a part together, because a part is used by one processor at a time.

    Raises:
        InputError: negative counts, a table that is too short, fewer than one space.
    """
    found = np.asarray(counts, dtype=np.int64)
    tables = [np.asarray(table, dtype=np.float64) for table in (t_high, t_low)]
    if found.ndim == 0:
        raise InputError("counts: got a single number, expected the tokens of each expert")
    if found.size and found.min() < 0:
        raise InputError(f"counts: got {found.min()}, expected 0 or more tokens")
    if found.size and min(len(table) for table in tables) <= found.max():
        raise InputError(f"times are tabulated to {min(map(len, tables)) - 1} tokens, an expert has {found.max()}")
    high, low = (np.where(found > 0, table[found], 0.0) for table in tables)
    if spaces is None:
        return _best_prefix(found, high, low)
    if spaces < 1:
        raise InputError(f"spaces: got {spaces}, expected at least 1")
    grouped = _best_prefix(*(_by_space(values, spaces) for values in (found, high, low)))
    belongs = np.arange(found.shape[-1]) % spaces
    return ExpertSplit(grouped.low[..., belongs], grouped.low_seconds, grouped.high_seconds)


def _best_prefix(counts: NDArray[Any], high: NDArray[np.float64], low: NDArray[np.float64]) -> ExpertSplit:
    order = np.argsort(counts, axis=-1, kind="stable")
    moved = _prefix_sums(np.take_along_axis(low, order, -1))
    # What stays is summed from the far end, so that nothing is left over when everything has moved.
    stays = _prefix_sums(np.take_along_axis(high, order, -1)[..., ::-1])[..., ::-1]
    best = np.maximum(moved, stays).argmin(-1)[..., None]
    rank = np.argsort(order, axis=-1, kind="stable")
    low_seconds, high_seconds = (np.take_along_axis(sums, best, -1)[..., 0] for sums in (moved, stays))
    return ExpertSplit(rank < best, low_seconds, high_seconds)


def _prefix_sums(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sums of the first 0, 1, ... of the last axis."""
    start = np.zeros((*values.shape[:-1], 1))
    return np.concatenate([start, values.cumsum(-1)], -1)


def _by_space(values: NDArray[Any], spaces: int) -> NDArray[Any]:
    missing = -values.shape[-1] % spaces
    padded = np.concatenate([values, np.zeros((*values.shape[:-1], missing), values.dtype)], -1)
    total: NDArray[Any] = padded.reshape(*values.shape[:-1], -1, spaces).sum(-2)
    return total
