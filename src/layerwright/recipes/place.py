"""The job of `layerwright place`: which layer of a served language model runs where, and what that gains."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from layerwright.allocate.coprocess import Placement, Rule, op_per_byte_plan
from layerwright.core.errors import CheckpointError, InputError
from layerwright.recipes.serving import ServingReport, ServingSimulator, StageTimer, make_requests, read_requests
from layerwright.recipes.serving.requests import Request
from layerwright.recipes.serving.shapes import shape_of
from layerwright.recipes.serving.systems import system_of
from layerwright.score.device import (
    CostTable,
    Device,
    LMShape,
    Stage,
    Work,
    device,
    draw_counts,
    layer_costs,
    preset_shapes,
    seconds,
)
from layerwright.score.device.costs import expert_work

__all__ = ["LayerKind", "Load", "PlaceResult", "place_job", "save_place"]

_PER_NODE = 8
_RULES: dict[str, Rule] = {"fastest": "fastest", "hetero": "experts"}


@dataclass(frozen=True)
class Load:
    """Requests to serve.

    Attributes:
        batch: that may run at once.
        prompt, new: mean tokens given and to make.
        rate: Poisson arrivals per second; None with `trace` None is a closed loop that begins warm.
        trace: file of requests, instead of all of the above but `batch`.
        number: of requests with a `rate`.
        steps: of the closed loop.
        spread: standard deviation of the lengths over their means.
    """

    batch: int = 64
    prompt: int = 1024
    new: int = 1024
    rate: float | None = None
    trace: str | None = None
    number: int = 256
    steps: int = 500
    spread: float = 0.1

    def requests(self, seed: int) -> list[Request]:
        """The requests.

        Raises:
            InputError: numbers below 1, a rate that is not above 0, a trace that cannot be read.
            FileNotFoundError: no such trace.
        """
        if self.batch < 1 or self.steps < 1:
            raise InputError(f"got a batch of {self.batch} and {self.steps} steps, expected at least 1 of each")
        if self.trace is not None:
            return read_requests(self.trace)
        number = (
            self.number if self.closed is False else self.batch * (2 + math.ceil(3 * self.steps / max(self.new, 1)))
        )
        return make_requests(number, self.prompt, self.new, rate=self.rate, spread=self.spread, seed=seed)

    @property
    def closed(self) -> bool:
        """Whether a finished request is replaced at once."""
        return self.rate is None and self.trace is None

    def __str__(self) -> str:
        if self.trace is not None:
            return f"requests of {self.trace}, at most {self.batch} at a time"
        how = f"{self.rate:g} requests/s" if self.rate is not None else "closed loop"
        return f"{how}, batch {self.batch}, {self.prompt} prompt and {self.new} new tokens"


@dataclass(frozen=True)
class LayerKind:
    """All layers of a kind in one stage, on one device.

    Attributes:
        stage: `decode`, `mixed` or `prefill`.
        kind: as in `CostTable.kinds`.
        layers: how many.
        flops, bytes: of all of them.
        high_seconds, low_seconds: of all of them, on each processor; None without a low one.
        processor: `high`, `low` or `both`.
    """

    stage: str
    kind: str
    layers: int
    flops: float
    bytes: float
    high_seconds: float
    low_seconds: float | None
    processor: str

    @property
    def op_per_byte(self) -> float:
        """Operations per byte."""
        return self.flops / self.bytes if self.bytes else 0.0


@dataclass(frozen=True)
class PlaceResult:
    """What `place_job` found.

    Attributes:
        shape, device, load: what was asked.
        n_devices, nodes, policy: of the first system.
        kinds: Op/B and times by kind of layer and stage.
        placements: stage to processor by layer.
        low_experts: stage to the experts of each block that run low for one draw of tokens, where both work.
        reports: system to what it did, the asked one first.
        skipped: systems that cannot serve this model, and why.
        seed, seconds: of this run.
    """

    shape: LMShape
    device: Device
    load: Load
    n_devices: int
    nodes: int
    policy: str
    kinds: Sequence[LayerKind]
    placements: Mapping[str, Placement]
    low_experts: Mapping[str, Mapping[str, Sequence[int]]]
    reports: Mapping[str, ServingReport]
    skipped: Mapping[str, str]
    seed: int
    seconds: float

    @property
    def system(self) -> str:
        """Name of the asked system."""
        return next(iter(self.reports))

    def gain(self, name: str) -> float:
        """Throughput of the asked system over that of another."""
        other = self.reports[name].throughput
        return self.reports[self.system].throughput / other if other else math.inf

    def place_data(self) -> dict[str, Any]:
        """What ``place.yaml`` holds: every layer, its processor and why."""
        stages = {}
        for name, placement in self.placements.items():
            layers = placement.to_data()["layers"]
            for layer, ids in self.low_experts.get(name, {}).items():
                row = layers[layer]
                del row["microseconds"]
                row |= {"processor": "both", "low_experts": list(ids), "why": "fewest tokens to the low, in one draw"}
            stages[name] = layers
        return {
            "model": self.shape.name,
            "device": self.device.name,
            "devices": self.n_devices,
            "nodes": self.nodes,
            "policy": self.policy,
            "load": str(self.load),
            "seed": self.seed,
            "stages": stages,
        }

    def to_data(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "model": self.shape.to_data() | {"params": self.shape.params, "weight_bytes": self.shape.weight_bytes},
            "device": self.device.to_data(),
            "devices": self.n_devices,
            "nodes": self.nodes,
            "policy": self.policy,
            "load": dataclasses.asdict(self.load) | {"text": str(self.load)},
            "kinds": [dataclasses.asdict(kind) | {"op_per_byte": kind.op_per_byte} for kind in self.kinds],
            "systems": {name: report.to_data() for name, report in self.reports.items()},
            "gains": {name: self.gain(name) for name in self.reports if name != self.system},
            "skipped": dict(self.skipped),
            "seed": self.seed,
            "seconds": self.seconds,
        }


def place_job(
    model: str,
    on: str | Path | Device = "duplex",
    load: Load | None = None,
    *,
    n_devices: int | None = None,
    nodes: int | None = None,
    policy: str = "auto",
    compare: Sequence[str] = ("gpu",),
    efficiency: tuple[float, float] | None = None,
    strict_memory: bool = False,
    skew: float = 0.0,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> PlaceResult:
    """Cost every layer, place it, and serve the same requests on the device and on what it is compared with.

    Args:
        model: see `layerwright.recipes.serving.shapes.shape_of`.
        on: see `layerwright.score.device.device`.
        load: requests to serve.
        n_devices: that of a preset, else as few as hold the weights in 70 % of their memory, in powers of two.
        nodes: that of a preset, else as few as have at most 8 devices.
        policy: of `layerwright.recipes.serving.POLICIES`, or `auto`.
        compare: systems, see `layerwright.recipes.serving.systems.system_of`; one that cannot serve the model is skipped with its reason.
        efficiency: shares of their peaks that the high and the low processor reach; None takes the device's own.
        strict_memory: raise where the cache of a whole batch does not fit, instead of running fewer requests.
        skew: exponent of a Zipf law over the experts; 0 is uniform.
        seed: of lengths, arrivals and choices of experts.
        progress: ``progress(what, done, total)``.

    Raises:
        InputError: anything that cannot be used; unknown names list close ones.
        FileNotFoundError: no such model, device file or trace.
    """
    begun = time.perf_counter()
    load = load or Load()
    shape, target = shape_of(model), device(on)
    if efficiency is not None:
        target = target.with_efficiency(*efficiency)
    requests = load.requests(seed)
    n_devices, nodes = _sizes(shape, target, n_devices, nodes)
    # Names are refused before anything is simulated.
    systems = {name: system_of(name, target, n_devices, efficiency) for name in dict.fromkeys(compare)}
    settings: dict[str, Any] = {"batch": load.batch, "seed": seed, "skew": skew}
    settings |= {"kv_overflow": "raise" if strict_memory else "reduce"}
    tell = progress or (lambda _what, _done, _total: None)
    first = ServingSimulator(shape, target, n_devices, policy, nodes=nodes, name=target.name, **settings)
    runs: dict[str, ServingSimulator] = {target.name: first}
    skipped: dict[str, str] = {}
    for name, (other, number, its_policy) in systems.items():
        try:
            its_nodes = max(nodes, math.ceil(number / _PER_NODE)) if number != n_devices else nodes
            title = name if name not in runs else f"{name} (compared)"
            runs[title] = ServingSimulator(shape, other, number, its_policy, nodes=its_nodes, name=name, **settings)
        except InputError as error:
            skipped[name] = str(error)
    reports: dict[str, ServingReport] = {}
    for done, (name, simulator) in enumerate(runs.items()):
        tell(f"serving on {name}", done, len(runs))
        try:
            reports[name] = simulator.run(
                requests, closed_loop=load.closed, warm=load.closed, max_steps=load.steps if load.closed else None
            )
        except InputError as error:
            if simulator is first:
                raise
            skipped[name] = str(error)
    tell("done", len(runs), len(runs))
    kinds, placements, low_experts = _stages(first, reports[target.name].batch, requests)
    taken = time.perf_counter() - begun
    return PlaceResult(
        shape,
        target,
        load,
        n_devices,
        nodes,
        first.policy,
        kinds,
        placements,
        low_experts,
        reports,
        skipped,
        seed,
        taken,
    )


def save_place(result: PlaceResult, out: str | Path) -> None:
    """Write ``place.yaml`` and ``results.json`` into the folder `out`.

    Raises:
        CheckpointError: a file cannot be written.
    """
    from layerwright.treat.writer import write_json

    folder = Path(out)
    head = (
        "# Which processor runs which layer, by stage. `microseconds` are of one device and leave out communication.\n"
    )
    text = head + yaml.safe_dump(result.place_data(), sort_keys=False, allow_unicode=True, width=120)
    temporary = folder / "place.yaml.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(folder / "place.yaml")
    except OSError as error:
        if temporary.is_file():
            temporary.unlink()
        raise CheckpointError(
            f"{folder / 'place.yaml'} cannot be written ({error.strerror or error}): give a place you may write to"
        ) from error
    write_json(folder / "results.json", result.to_data())


def _sizes(shape: LMShape, target: Device, n_devices: int | None, nodes: int | None) -> tuple[int, int]:
    if n_devices is None:
        holds = 0.7 * target.capacity_bytes
        few = 2 ** max(math.ceil(math.log2(shape.weight_bytes / holds)), 0)
        n_devices = shape.devices if shape.name in preset_shapes() else few * (1 if target.layout == "shared" else 2)
        nodes = shape.nodes if nodes is None and n_devices == shape.devices else nodes
    if n_devices < 1:
        raise InputError(f"devices: got {n_devices}, expected at least 1")
    return n_devices, math.ceil(n_devices / _PER_NODE) if nodes is None else nodes


def _stages(
    simulator: ServingSimulator, batch: int, requests: Sequence[Request]
) -> tuple[list[LayerKind], dict[str, Placement], dict[str, dict[str, list[int]]]]:
    """A typical stage of each kind: every request half done, and one that joins."""
    prompt = max(round(float(np.mean([request.prompt for request in requests]))), 1)
    new = max(round(float(np.mean([request.new for request in requests]))), 1)
    contexts = (prompt + math.ceil(new / 2),) * batch
    stages = {"decode": Stage(contexts), "prefill": Stage(prefill=(prompt,))}
    if batch > 1 and simulator.device.layout != "split":
        stages["mixed"] = Stage(contexts[1:], (prompt,))
    shape, timer, target = simulator.shape, simulator.timer, simulator.timer.device
    own = target.without_low() if simulator.policy == "gpu" else target
    generator = np.random.default_rng(simulator.seed)
    kinds: list[LayerKind] = []
    placements: dict[str, Placement] = {}
    low_experts: dict[str, dict[str, list[int]]] = {}
    for name, stage in stages.items():
        counts = draw_counts(shape, stage.tokens, generator, skew=simulator.skew)
        costs = _of_one_device(timer, stage, counts)
        placements[name] = op_per_byte_plan(costs, own, rule=_RULES.get(simulator.policy, "kind"))
        together = own.low is not None and simulator.policy in ("duplex+pe", "duplex+pe+et") and len(counts) > 0
        if together:
            rows = zip(shape.moe_layers, timer.low_experts(counts, stage.kind), strict=True)
            low_experts[name] = {
                f"layers.{layer}.experts": [int(place) for place in np.flatnonzero(row)] for layer, row in rows
            }
        for kind in dict.fromkeys(costs.kinds):
            chosen = np.array([one == kind for one in costs.kinds])
            work = Work(costs.flops[chosen], costs.bytes[chosen])
            side = placements[name].layers[costs.names[int(chosen.argmax())]]
            kinds.append(
                LayerKind(
                    name,
                    kind,
                    int(chosen.sum()),
                    float(work.flops.sum()),
                    float(work.bytes.sum()),
                    float(seconds(work, target.high).sum()),
                    float(seconds(work, target.low).sum()) if target.low else None,
                    "both" if together and kind == "experts" else side,
                )
            )
    return kinds, placements, low_experts


def _of_one_device(timer: StageTimer, stage: Stage, counts: NDArray[np.int64]) -> CostTable:
    """Costs of the busiest device: its node's requests, and its even share of the work of all experts."""
    local = Stage(stage.decode[:: timer.nodes], stage.prefill[:: timer.nodes])
    table = layer_costs(timer.shape, local, shards=timer.shards)
    share = expert_work(timer.shape, counts, shards=timer.shards * timer.nodes)
    chosen = np.array([kind == "experts" for kind in table.kinds], dtype=bool)
    flops, size = table.flops.copy(), table.bytes.copy()
    flops[chosen], size[chosen] = share.flops.sum(-1), share.bytes.sum(-1)
    return dataclasses.replace(table, flops=flops, bytes=size)
