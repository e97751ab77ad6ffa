"""Compatibility screening: cheap tests before a proxy is evaluated in full."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from layerwright.score.proxies.bench import BitBench, spearman
from layerwright.score.proxies.operations import BOUND

__all__ = ["FIRST", "PROBES", "Judge", "Table", "Verdict"]

Floats = np.ndarray[Any, np.dtype[np.float64]]

FIRST = 4
"""Bit vectors that early rejection looks at."""

PROBES = 16
"""Bit vectors whose ranks tell equivalent proxies."""

WORST = -2.0
"""Fitness of a proxy without a rank correlation; below every correlation."""


@dataclass(frozen=True)
class Verdict:
    """Fitness of a proxy and how it came about."""

    fitness: float
    how: Literal["evaluated", "rejected", "reused"]

    @property
    def valid(self) -> bool:
        """Whether there is a rank correlation."""
        return self.fitness > WORST


@dataclass(frozen=True, eq=False)
class Table:
    """Measured bit vectors of one network as arrays.

    Attributes:
        vectors: ``(records, layers)`` bits, or what stands for them; quality: ``(records,)``, higher is better.
        probes: ``(PROBES, layers)`` random ones for the equivalence test.
    """

    vectors: Floats
    quality: Floats
    probes: Floats

    @classmethod
    def of(cls, bench: BitBench, random: np.random.Generator, weights: Floats | None = None) -> Table:
        """All records of `bench`, with random probes; `weights` ``(layers, bench.widths)`` take the place of bits."""
        probes = random.choice(bench.widths, (PROBES, len(bench.layers)))
        if weights is None:
            return cls(bench.vectors.astype(np.float64), bench.quality, probes.astype(np.float64))
        layers = np.arange(len(bench.layers))
        weigh = [weights[layers, np.searchsorted(bench.widths, bits)] for bits in (bench.vectors, probes)]
        return cls(weigh[0], bench.quality, weigh[1])


@dataclass
class Judge:
    """Fitness of proxies on measured bit vectors: the mean rank correlation over the networks.

    Attributes:
        tables: one per network.
        top: share of the best records that ranks are correlated on.
        screen: whether proxies are screened first.
        known: hash of the ranks on the probes to fitness.
        counts: verdicts by kind.
    """

    tables: Sequence[Table]
    top: float = 1.0
    screen: bool = True
    known: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=lambda: {"evaluated": 0, "rejected": 0, "reused": 0, "invalid": 0})

    def __call__(self, values: Sequence[float]) -> Verdict:
        """The verdict on a proxy with those layer values ``(layers of all networks,)``."""
        ends = np.cumsum([table.vectors.shape[1] for table in self.tables])
        parts = np.split(np.array(values, dtype=np.float64), ends[:-1])
        verdict = self._judge(parts)
        self.counts[verdict.how] += 1
        self.counts["invalid"] += not verdict.valid
        return verdict

    def _judge(self, parts: Sequence[Floats]) -> Verdict:
        if not self.screen:
            return Verdict(self._fitness(parts), "evaluated")
        pairs = list(zip(self.tables, parts, strict=True))
        if any(_hopeless(table.vectors[:FIRST] @ part) for table, part in pairs):
            return Verdict(WORST, "rejected")
        key = "".join(_rank_hash(table.probes @ part) for table, part in pairs)
        if key in self.known:
            return Verdict(self.known[key], "reused")
        self.known[key] = self._fitness(parts)
        return Verdict(self.known[key], "evaluated")

    def _fitness(self, parts: Sequence[Floats]) -> float:
        found = []
        for table, part in zip(self.tables, parts, strict=True):
            scores = table.vectors @ part
            if not np.isfinite(scores).all() or float(np.abs(part).max()) >= BOUND:
                return WORST
            found.append(spearman(_rounded(scores), table.quality, self.top))
        mean = float(np.mean(found))
        return mean if np.isfinite(mean) else WORST


def _hopeless(scores: Floats) -> bool:
    """Whether the first scores are not finite, all equal (0 and -1 among them), or cut off at the bound."""
    if not np.isfinite(scores).all() or float(np.abs(scores).max()) >= BOUND:
        return True
    return bool(len(np.unique(_rounded(scores))) == 1)


def _rounded(scores: Floats) -> Floats:
    """Scores at 6 digits of the largest: what differs by less is rounding, and counts as a tie."""
    scale = float(np.abs(scores).max())
    return np.round(scores / scale, 6) if scale > 0 else scores


def _rank_hash(scores: Floats) -> str:
    """The same for scores in the same order: equal up to a rising transform."""
    _, ranks = np.unique(_rounded(scores), return_inverse=True)
    return hashlib.sha256(ranks.astype(np.int16).tobytes()).hexdigest()[:16]
