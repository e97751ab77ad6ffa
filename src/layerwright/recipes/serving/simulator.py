"""A discrete-event simulation of continuous batching (Yu et al., 2022) on devices with one or two processors."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from layerwright.core.errors import InputError
from layerwright.recipes.serving.memory import kv_budget
from layerwright.recipes.serving.metrics import Distribution, ServingReport
from layerwright.recipes.serving.requests import Request
from layerwright.recipes.serving.stages import ExpertLayout, StageTime, StageTimer, default_policy
from layerwright.score.device.costs import Stage
from layerwright.score.device.processors import Device
from layerwright.score.device.routing import draw_counts
from layerwright.score.device.shapes import LMShape

__all__ = ["ServingSimulator"]


class ServingSimulator:
    """Serves requests step by step: admit, compute one stage, advance.

    A request's first token comes from its prefill, each further one from a decode step. A request is admitted when a
    place in the batch and the memory for all of its keys and values are free, first come, first served. Costs
    O(blocks x experts + tokens x blocks x top_k) per step; keeps 8 bytes for every token that is made.

    Args:
        shape, device: model and device.
        n_devices: devices of the system; that of the model's shape if left out.
        policy: of `layerwright.recipes.serving.stages.POLICIES`; `auto` takes the best that the device can follow.
        batch: requests that may run at once, at least 1.
        seed: of the choices of experts and of a warm start.
        nodes: groups of devices with slower links between them; that of the model's shape if left out.
        skew: exponent of a Zipf law over the experts; 0 is uniform.
        by_space: experts in the same part of the memory move together between the processors.
        communication: count the time of the links.
        experts: `whole` on one device each, or split over a node as `tensor`; `auto` as the policy says.
        kv_overflow: where the cache of `batch` requests does not fit, `reduce` the batch or `raise`.
        name: of the system, for tables.

    Raises:
        InputError: weights that do not fit, a policy or numbers that do not go together.
    """

    def __init__(
        self,
        shape: LMShape,
        device: Device,
        n_devices: int | None = None,
        policy: str = "auto",
        batch: int = 64,
        seed: int = 0,
        *,
        nodes: int | None = None,
        skew: float = 0.0,
        by_space: bool = False,
        communication: bool = True,
        experts: ExpertLayout = "auto",
        kv_overflow: Literal["reduce", "raise"] = "reduce",
        name: str = "",
    ) -> None:
        n_devices = shape.devices if n_devices is None else n_devices
        nodes = shape.nodes if nodes is None else nodes
        if batch < 1:
            raise InputError(f"batch: got {batch}, expected at least 1")
        if kv_overflow not in ("reduce", "raise"):
            raise InputError(f"kv_overflow: got {kv_overflow!r}, expected reduce or raise")
        if skew < 0:
            raise InputError(f"skew: got {skew}, expected 0 (uniform) or more")
        if device.layout == "split" and (n_devices // nodes) % 2:
            raise InputError(f"{device.name} splits the devices of a node: got {n_devices // nodes}, expected even")
        policy = default_policy(device) if policy == "auto" else policy
        self.shape, self.device, self.n_devices, self.batch, self.seed = shape, device, n_devices, batch, seed
        self.name, self.skew, self.kv_overflow, self.policy = name or device.name, skew, kv_overflow, policy
        part = n_devices // 2 if device.layout == "split" else n_devices
        self.timer = StageTimer(
            shape, device, part, policy, nodes=nodes, by_space=by_space, communication=communication, experts=experts
        )
        self.budget = kv_budget(shape, device, n_devices, nodes)

    def run(
        self,
        requests: Sequence[Request],
        *,
        closed_loop: bool = False,
        warm: bool = False,
        max_steps: int | None = None,
    ) -> ServingReport:
        """Serve `requests`, first come, first served.

        Args:
            requests: at least one.
            closed_loop: arrivals are left out: a batch of requests runs at all times, and a finished one is replaced
                by the next at once.
            warm: begin with a full batch whose requests are at random points of their answers, as after a long
                while; times to the first token and to the end of those are not counted. Closed loop only.
            max_steps: stop after so many stages; None serves all.

        Raises:
            InputError: no requests, one that cannot fit, a warm start with arrivals, fewer than one step.
        """
        if not requests:
            raise InputError("requests: got none, expected at least one")
        if warm and not closed_loop:
            raise InputError("warm: a warm start needs closed_loop=True")
        if max_steps is not None and max_steps < 1:
            raise InputError(f"max_steps: got {max_steps}, expected at least 1")
        run = _Run(self, requests, self._batch_that_fits(requests), closed_loop, warm)
        while run.pending and (max_steps is None or run.steps < max_steps):
            run.step()
        return run.report()

    def draw(self, stage: Stage, generator: np.random.Generator) -> StageTime:
        """The time of one stage, with a draw of the experts."""
        return self.timer.time(stage, draw_counts(self.shape, stage.tokens, generator, skew=self.skew))

    def _batch_that_fits(self, requests: Sequence[Request]) -> int:
        largest = max(self.shape.kv_bytes(request.prompt + request.new) for request in requests)
        if largest > self.budget:
            raise InputError(
                f"{self.name}: the keys and values of one request take {largest / 1e9:,.1f} GB, and {self.budget / 1e9:,.1f} "
                "GB are left beside the weights: use more devices or shorter requests"
            )
        fits = int(self.budget // largest)
        if fits < self.batch and self.kv_overflow == "raise":
            raise InputError(
                f"{self.name}: the keys and values of {self.batch} requests take {self.batch * largest / 1e9:,.1f} GB, and "
                f"{self.budget / 1e9:,.1f} GB are left beside the weights: at most {fits} requests fit"
            )
        return min(fits, self.batch)


class _Run:
    """State of one run: requests that wait, those that run, and what was measured."""

    def __init__(
        self, simulator: ServingSimulator, requests: Sequence[Request], fits: int, closed: bool, warm: bool
    ) -> None:
        self.simulator, self.requests, self.fits, self.closed = simulator, requests, fits, closed
        self.split = simulator.device.layout == "split"
        self.generator = np.random.default_rng(simulator.seed)
        self.order = list(range(len(requests)))
        if not closed:
            self.order.sort(key=lambda place: requests[place].arrival)
        self.next = 0
        self.now = self.prefill_clock = 0.0
        self.waiting: deque[tuple[float, int]] = deque()  # (arrival, request)
        self.ready: deque[tuple[float, float, float, int]] = deque()  # (ready, first token, arrival, request)
        # Columns of the running requests: request, tokens in the cache, tokens left, arrival, last token, is counted.
        self.running: NDArray[np.float64] = np.zeros((0, 6))
        self.reserved = 0.0
        self.steps = self.tokens = self.completed = 0
        self.first: list[float] = []
        self.gaps: list[NDArray[np.float64]] = []
        self.ends: list[float] = []
        self.by_layer: dict[str, float] = {}
        self.stages: dict[str, int] = {}
        self.high = self.low = 0.0
        self.joules = 0.0
        self.backlog: list[tuple[int, int]] = []  # (arrived so far, waiting then)
        if warm:
            self._start_warm()
        elif closed:
            for _ in range(fits):
                self._enter(0.0)

    @property
    def pending(self) -> bool:
        """Whether anything is left to do."""
        return bool(
            len(self.running) or self.waiting or self.ready or (not self.closed and self.next < len(self.order))
        )

    def _start_warm(self) -> None:
        """Fill the batch with the first requests, each at a random point of its answer."""
        rows: list[tuple[float, ...]] = []
        for place in self.order[: self.fits]:
            request = self.requests[place]
            made = int(self.generator.integers(0, request.new))
            rows.append((place, request.prompt + made, request.new - made, 0.0, 0.0, 0.0))
            self.reserved += self._cache(place)
        self.next = len(rows)
        self._join(rows)

    def step(self) -> None:
        """Arrivals, one stage, and its consequences."""
        self._arrive()
        joining = self._admit_ready() if self.split else self._admit()
        if not len(self.running) and not joining:
            self._skip_idle()
            return
        stage = Stage(tuple(int(c) + 1 for c in self.running[:, 1]), tuple(self.requests[p].prompt for _, p in joining))
        taken = self.simulator.draw(stage, self.generator)
        self.now += taken.seconds
        self._count(taken, stage.kind)
        self.steps += 1
        if len(self.running):
            self.gaps.append(self.now - self.running[:, 4])
            self.tokens += len(self.running)
            self.running[:, 1] += 1
            self.running[:, 2] -= 1
            self.running[:, 4] = self.now
        if joining:
            self.first += [self.now - arrival for arrival, _ in joining]
            self.tokens += len(joining)
            self._join([self._row(place, arrival, self.now) for arrival, place in joining])
        self._leave()

    def report(self) -> ServingReport:
        """What was measured."""
        gaps = np.concatenate(self.gaps) if self.gaps else np.zeros(0)
        unfinished = len(self.running) + len(self.waiting) + len(self.ready)
        return ServingReport(
            system=self.simulator.name,
            tokens=self.tokens,
            requests=len(self.requests),
            completed=self.completed,
            unfinished=unfinished,
            seconds=self.now,
            t2ft=Distribution.of(self.first),
            tbt=Distribution.of(gaps),
            e2e=Distribution.of(self.ends),
            time_by_layer=dict(sorted(self.by_layer.items())),
            high_seconds=self.high,
            low_seconds=self.low,
            stages=dict(sorted(self.stages.items())),
            batch=self.fits,
            joules=self.joules if self.simulator.device.energy else None,
            warnings=self._warnings(),
        )

    # -- arrivals and admission ---------------------------------------------------------------------------------------

    def _enter(self, arrival: float) -> None:
        """The next request of the list begins to wait, or goes to the devices that prefill."""
        if self.next >= len(self.order):
            return
        place = self.order[self.next]
        self.next += 1
        if self.split:
            self._prefill_apart(arrival, place)
        else:
            self.waiting.append((arrival, place))

    def _arrive(self) -> None:
        while (
            not self.closed and self.next < len(self.order) and self.requests[self.order[self.next]].arrival <= self.now
        ):
            self._enter(self.requests[self.order[self.next]].arrival)
            self.backlog.append((self.next, len(self.waiting) + len(self.ready)))

    def _admit(self) -> list[tuple[float, int]]:
        joining: list[tuple[float, int]] = []
        while self.waiting and self._fits(self.waiting[0][1], len(joining)):
            joining.append(self.waiting.popleft())
            self.reserved += self._cache(joining[-1][1])
        return joining

    def _admit_ready(self) -> list[tuple[float, int]]:
        """Requests whose keys and values have come over from the devices that prefill; they decode from now on."""
        rows: list[tuple[float, ...]] = []
        while self.ready and self.ready[0][0] <= self.now and self._fits(self.ready[0][3], len(rows)):
            _, first, arrival, place = self.ready.popleft()
            rows.append(self._row(place, arrival, first))
            self.reserved += self._cache(place)
        self._join(rows)
        self._leave()
        return []

    def _prefill_apart(self, arrival: float, place: int) -> None:
        request, simulator = self.requests[place], self.simulator
        taken = simulator.draw(Stage(prefill=(request.prompt,)), self.generator)
        self.prefill_clock = max(self.prefill_clock, arrival) + taken.seconds
        self._count(taken, "prefill")
        self.first.append(self.prefill_clock - arrival)
        self.tokens += 1
        links, part = simulator.device.links, simulator.n_devices // 2
        moved = links.latency_seconds + simulator.shape.kv_bytes(request.prompt) / part / links.bandwidth
        self.ready.append((self.prefill_clock + moved, self.prefill_clock, arrival, place))

    def _skip_idle(self) -> None:
        """Nothing to compute: on to the next event."""
        times = [self.ready[0][0]] if self.ready else []
        if not self.closed and self.next < len(self.order):
            times.append(self.requests[self.order[self.next]].arrival)
        self.now = max(self.now, min(times)) if times else self.now

    def _fits(self, place: int, joining: int) -> bool:
        room = self.reserved + self._cache(place) <= self.simulator.budget * (1 + 1e-12)
        return room and len(self.running) + joining < self.simulator.batch

    def _cache(self, place: int) -> float:
        request = self.requests[place]
        return self.simulator.shape.kv_bytes(request.prompt + request.new)

    # -- progress -----------------------------------------------------------------------------------------------------

    def _row(self, place: int, arrival: float, first: float) -> tuple[float, ...]:
        request = self.requests[place]
        return (place, request.prompt, request.new - 1, arrival, first, 1.0)

    def _join(self, rows: list[tuple[float, ...]]) -> None:
        if rows:
            self.running = np.concatenate([self.running, np.array(rows, dtype=np.float64)])

    def _leave(self) -> None:
        done = self.running[:, 2] <= 0
        if not done.any():
            return
        finished, self.running = self.running[done], self.running[~done]
        for place, _, _, arrival, last, counted in finished:
            self.completed += 1
            self.reserved -= self._cache(int(place))
            if counted:
                self.ends.append(last - arrival)
            if self.closed:
                self._enter(float(last))

    def _count(self, taken: StageTime, kind: str) -> None:
        for name, time in taken.by_layer.items():
            self.by_layer[name] = self.by_layer.get(name, 0.0) + time
        self.stages[kind] = self.stages.get(kind, 0) + 1
        self.high += taken.high_seconds
        self.low += taken.low_seconds
        self.joules += taken.joules or 0.0

    def _warnings(self) -> tuple[str, ...]:
        found = []
        if self.fits < self.simulator.batch:
            found.append(
                f"the cache of {self.simulator.batch} of the longest requests does not fit: {self.fits} at a time"
            )
        if self._diverges():
            found.append("requests arrive faster than they are served: the queue grows without bound")
        return tuple(found)

    def _diverges(self) -> bool:
        """A twentieth of all requests waits at the last arrival, and half as many again as at half of the arrivals."""
        if len(self.backlog) < 4 or self.requests[self.order[-1]].arrival == self.requests[self.order[0]].arrival:
            return False
        middle, last = self.backlog[len(self.backlog) // 2][1], self.backlog[-1][1]
        return last >= max(8, len(self.requests) // 20) and last > 1.5 * middle
