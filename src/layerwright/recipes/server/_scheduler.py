"""Continuous batching: a thread that owns the engine, rows that requests take and give back between two steps."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from layerwright.core.errors import InputError, LayerwrightError
from layerwright.treat.engine import InferenceModel, Sampling
from layerwright.treat.engine._sampling import choose

__all__ = ["BusyError", "Event", "Job", "Reason", "Scheduler"]

Reason = Literal["stop", "length", "cancelled", "failed"]


class BusyError(LayerwrightError):
    """All rows are taken and the queue is full, or the scheduler is closed."""


@dataclass(frozen=True)
class Event:
    """A new token, or the end: `token` is None then, and `reason` says why. `message` is for ``failed``."""

    token: int | None
    reason: Reason | None = None
    message: str = ""


@dataclass(eq=False)
class Job:
    """A request and how far it is.

    Attributes:
        ids: its prompt.
        max_tokens: new tokens at most.
        sampling: how they are chosen; no beams.
        seed: of the draws.
        deliver: called in the scheduler's thread with each `Event`, in order; must return at once.
        read: tokens of the prompt that are in the cache.
        made: new tokens so far.
        last: the newest token, not yet in the cache.
        cancelled: nobody waits for it any more.
    """

    ids: Tensor
    max_tokens: int
    sampling: Sampling
    seed: int
    deliver: Callable[[Event], None]
    read: int = 0
    made: int = 0
    last: int = 0
    cancelled: bool = False
    generator: torch.Generator = field(default_factory=torch.Generator)


class Scheduler:
    """Serves up to `slots` sequences at once and keeps up to `queue` waiting, in order of arrival.

    Before each step, rows whose request ended are given to the last ones, so that a step computes the running rows
    only, and one part of one prompt is read: running requests wait for a part of a prompt, never for a whole one.
    What a request gets does not depend on its neighbours, except for the rounding of sums.

    Args:
        engine: used by this scheduler alone; its ``max_batch`` is the number of slots.
        queue: requests that wait at most.
        prompt_part: tokens of a prompt that are read between two steps.
    """

    def __init__(self, engine: InferenceModel, queue: int = 64, prompt_part: int = 256) -> None:
        for name, value, least in (("queue", queue, 0), ("prompt_part", prompt_part, 1)):
            if value < least:
                raise InputError(f"{name}: got {value}, expected at least {least}")
        self.engine, self.queue, self.prompt_part = engine, queue, prompt_part
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._reading: Job | None = None
        self._change = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None
        self._ends = set(engine.eos_token_ids)
        self.served = 0

    @property
    def slots(self) -> int:
        """Sequences that are served at once."""
        return self.engine.max_batch

    def load(self) -> dict[str, int]:
        """How many requests run, wait, and were served."""
        with self._change:
            running = len(self._running) + (self._reading is not None)
            return {"running": running, "waiting": len(self._waiting), "served": self.served}

    def check(self, prompt: int, max_tokens: int) -> None:
        """Whether a request fits at all.

        Raises:
            InputError: an empty prompt, no tokens wanted, or more than ``max_length`` together.
        """
        if prompt < 1:
            raise InputError("prompt: it has no tokens")
        if max_tokens < 1:
            raise InputError(f"max_tokens: got {max_tokens}, expected at least 1")
        if prompt + max_tokens > self.engine.max_length:
            raise InputError(
                f"prompt: {prompt} tokens and max_tokens {max_tokens} exceed the {self.engine.max_length} tokens of this server"
            )

    def submit(
        self, ids: list[int], max_tokens: int, sampling: Sampling, seed: int, deliver: Callable[[Event], None]
    ) -> Job:
        """Take a request; its events come through `deliver` until one with a reason.

        Raises:
            InputError: see `check`; a token outside the vocabulary; beams.
            BusyError: no room.
        """
        self.check(len(ids), max_tokens)
        if sampling.num_beams > 1:
            raise InputError("num_beams: a server has no beams; use 1")
        vocabulary = self.engine.decoder.shape.vocabulary
        if min(ids) < 0 or max(ids) >= vocabulary:
            raise InputError(f"prompt: a token is outside the vocabulary of {vocabulary}")
        job = Job(torch.tensor(ids), max_tokens, sampling, seed, deliver)
        job.generator.manual_seed(seed)
        with self._change:
            if self._closed:
                raise BusyError("the server is shutting down")
            taken = len(self._running) + (self._reading is not None)
            if len(self._waiting) >= self.queue + max(0, self.slots - taken):
                raise BusyError(
                    f"all {self.slots} slots are taken and {len(self._waiting)} requests wait; try again later"
                )
            self._waiting.append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="layerwright-scheduler", daemon=True)
                self._thread.start()
            self._change.notify()
        return job

    def cancel(self, job: Job) -> None:
        """Give up a request; its row is free before the next step. Nothing is delivered for it any more."""
        with self._change:
            job.cancelled = True
            if job in self._waiting:
                self._waiting.remove(job)
            self._change.notify()

    def close(self) -> None:
        """End all requests and the thread; waits for the step that runs."""
        with self._change:
            self._closed = True
            self._change.notify()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._change:
                while not (self._closed or self._waiting or self._running or self._reading):
                    self._change.wait()
                if self._closed:
                    break
                if self._reading is None and self._waiting and len(self._running) < self.slots:
                    self._reading = self._waiting.popleft()
            try:
                self._drop_cancelled()
                self._read_part()
                self._step()
            except Exception as error:  # a request must not end the server
                self._end_all("failed", f"{type(error).__name__}: the engine could not go on")
        self._end_all("cancelled", "the server is shutting down")

    def _read_part(self) -> None:
        """Read a part of one prompt into the row after the running ones; with its end the request runs."""
        job = self._reading
        if job is None:
            return
        row = len(self._running)
        piece = job.ids[job.read : job.read + self.prompt_part]
        logits = self.engine.prefill_row(row, piece, job.read)
        job.read += len(piece)
        if job.read == len(job.ids):
            with self._change:
                self._reading = None
                self._running.append(job)
            self._take(row, logits)

    def _step(self) -> None:
        """One token for every running request."""
        running = self._running
        if not running:
            return
        tokens = torch.tensor([job.last for job in running])
        lengths = torch.tensor([job.read for job in running])
        logits = self.engine.step_rows(tokens, lengths)
        greedy = logits.argmax(-1).tolist()
        for row in reversed(range(len(running))):  # rows that end are taken by later ones, which are done by then
            running[row].read += 1
            self._take(row, logits[row], greedy[row])

    def _take(self, row: int, logits: Tensor, likeliest: int | None = None) -> None:
        """Choose and deliver a token, and the end if it is the last one. What fails here ends this request alone."""
        job = self._running[row]
        try:
            if job.sampling.temperature > 0 or likeliest is None:
                token = int(choose(logits[None], job.sampling, job.generator))
            else:
                token = likeliest
        except RuntimeError:  # shares that are no numbers
            self._finish(row, Event(None, "failed", "no token could be drawn: the model's outputs are not finite"))
            return
        job.last = token
        job.made += 1
        if token in self._ends:
            self._finish(row, Event(None, "stop"))
            return
        self._deliver(job, Event(token))
        if job.made == job.max_tokens:
            self._finish(row, Event(None, "length"))

    def _finish(self, row: int, event: Event) -> None:
        """Free a row: the last running one moves there, and a prompt that is being read moves up."""
        job, last = self._running[row], len(self._running) - 1
        if row != last:
            self.engine.cache.move_row(last, row, self._running[last].read)
        if self._reading is not None and self._reading.read:
            self.engine.cache.move_row(last + 1, last, self._reading.read)
        with self._change:
            self._running[row] = self._running[last]
            self._running.pop()
            self.served += 1
        self._deliver(job, event)

    def _drop_cancelled(self) -> None:
        if self._reading is not None and self._reading.cancelled:
            with self._change:
                self._reading = None
        for row in reversed(range(len(self._running))):
            if self._running[row].cancelled:
                self._finish(row, Event(None, "cancelled"))

    def _deliver(self, job: Job, event: Event) -> None:
        if job.cancelled:
            return
        try:
            job.deliver(event)
        except Exception:  # its reader is gone
            job.cancelled = True

    def _end_all(self, reason: Reason, message: str) -> None:
        with self._change:
            jobs = [*self._running, *([self._reading] if self._reading else []), *self._waiting]
            self._running, self._reading = [], None
            self._waiting.clear()
        for job in jobs:
            self._deliver(job, Event(None, reason, message))
