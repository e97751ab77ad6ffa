"""What a run of the serving simulator measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["Distribution", "ServingReport"]


@dataclass(frozen=True)
class Distribution:
    """Seconds of many events.

    Attributes:
        count: events.
        mean: of all; None without any.
        percentiles: the 0th to the 100th; empty without any.
    """

    count: int
    mean: float | None
    percentiles: tuple[float, ...]

    @classmethod
    def of(cls, values: ArrayLike) -> Distribution:
        """The distribution of `values`."""
        found = np.asarray(values, dtype=np.float64)
        if not found.size:
            return cls(0, None, ())
        return cls(found.size, float(found.mean()), tuple(map(float, np.percentile(found, np.arange(101)))))

    def percentile(self, place: int) -> float:
        """The percentile `place`, 0 to 100; not-a-number without events."""
        return self.percentiles[place] if self.percentiles else float("nan")

    @property
    def p50(self) -> float:
        """The median."""
        return self.percentile(50)

    @property
    def p90(self) -> float:
        """The 90th percentile."""
        return self.percentile(90)

    @property
    def p99(self) -> float:
        """The 99th percentile."""
        return self.percentile(99)


@dataclass(frozen=True)
class ServingReport:
    """What one system did with a list of requests.

    Attributes:
        system: name.
        tokens: tokens that were made; `completed` counts finished requests, of `requests` in all.
        seconds: simulated time.
        t2ft: time to the first token, from arrival.
        tbt: time between tokens of a request.
        e2e: from arrival to the last token.
        time_by_layer: seconds by kind of layer, over all stages.
        high_seconds, low_seconds: that each processor was at work.
        stages: number of stages by kind.
        batch: requests that can run at once; less than was asked for where the cache does not fit.
        unfinished: requests that had begun or waited when the run ended.
        joules: energy, where the device has constants.
        warnings: what a reader must know before believing the figures.
    """

    system: str
    tokens: int
    requests: int
    completed: int
    unfinished: int
    seconds: float
    t2ft: Distribution
    tbt: Distribution
    e2e: Distribution
    time_by_layer: dict[str, float]
    high_seconds: float
    low_seconds: float
    stages: dict[str, int]
    batch: int
    joules: float | None = None
    warnings: Sequence[str] = ()

    @property
    def throughput(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def joules_per_token(self) -> float | None:
        """Energy of a token, where the device has constants."""
        return None if self.joules is None or not self.tokens else self.joules / self.tokens

    def to_data(self) -> dict[str, Any]:
        """Plain data for JSON; what was not measured is None or empty."""
        return dataclasses.asdict(self) | {
            "throughput": self.throughput,
            "joules_per_token": self.joules_per_token,
            "warnings": list(self.warnings),
        }

    def __str__(self) -> str:
        text = (
            f"{self.system}: {self.throughput:,.0f} tokens/s, TBT {self.tbt.p50 * 1e3:.2f} ms (p99 "
            f"{self.tbt.p99 * 1e3:.2f}), {self.completed} of {self.requests} requests in {self.seconds:.2f} s"
        )
        return "; ".join([text, *(f"warning: {line}" for line in self.warnings)])
