"""Evolve a proxy against measured bit vectors (Dong et al., EMQ, 2023, arXiv 2307.10554)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from layerwright.core.errors import InputError
from layerwright.score.proxies.bench import BitBench, write_atomically
from layerwright.score.proxies.expression import STRUCTURES, ProxyTree, Structure
from layerwright.score.proxies.search.genetics import (
    OperationOdds,
    crossover,
    distance,
    mutate,
    odds_from_data,
    random_proxy,
)
from layerwright.score.proxies.search.screening import FIRST, Judge, Table, Verdict
from layerwright.score.proxies.search.workers import Engine, Evaluate, evaluator
from layerwright.score.proxies.statistics import LayerStatistics, joined
from layerwright.score.proxies.weighting import Weighting, bit_weights

__all__ = ["EvolvedProxy", "Settings", "evolve_proxy"]

TOURNAMENT = 4
"""Members that are drawn for the first parent."""

TRIES = 20
"""Draws of a fresh individual that is not in the population yet."""


@dataclass(frozen=True)
class EvolvedProxy:
    """What a search found.

    Attributes:
        best: the proxy of highest fitness.
        fitness: its rank correlation on the bench that was searched on.
        history: best fitness after the start and after each round; distinct: canonical forms in the population then.
        counts: proxies ``evaluated`` in full, ``rejected`` early, ``reused`` from an equivalent one, ``invalid``,
            ``duplicates`` that were replaced.
        odds: probabilities of operations in the end, unscaled.
        population: genotypes in string form to fitness, best first.
        settings: of the search.
    """

    best: ProxyTree
    fitness: float
    history: tuple[float, ...]
    distinct: tuple[int, ...]
    counts: Mapping[str, int]
    odds: Mapping[str, float]
    population: tuple[tuple[str, float], ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def to_data(self) -> dict[str, Any]:
        """Plain data; the scorer reads its ``genotype``."""
        return {
            "layerwright_proxy": 1,
            "genotype": self.best.genotype(),
            "expression": self.best.to_string(),
            "fitness": self.fitness,
            "counts": dict(self.counts),
            "settings": dict(self.settings),
            "history": list(self.history),
            "distinct": list(self.distinct),
        }

    def save(self, path: str | Path) -> Path:
        """Write JSON under a temporary name and rename it; ``proxy=path`` of the scorer reads it."""
        return write_atomically(Path(path), self.to_data())


@dataclass(frozen=True)
class Settings:
    """What a search is determined by, besides bench and statistics."""

    structure: Structure
    inputs: tuple[str, ...]
    population: int
    topk: float
    dps: bool
    csp: bool
    osp: bool
    children: int
    samples: int | None
    seed: int
    weighting: Weighting = "bits"

    def __post_init__(self) -> None:
        if self.structure not in STRUCTURES:
            raise InputError(f"structure: got {self.structure!r}, expected one of {', '.join(STRUCTURES)}")
        if self.population < 4 or self.children < 1:
            raise InputError(
                f"got population={self.population}, children={self.children}; expected at least 4 and at least 1"
            )


@dataclass
class _Member:
    proxy: ProxyTree
    fitness: float
    canonical: str


def evolve_proxy(
    bench: BitBench | Sequence[BitBench],
    statistics: LayerStatistics | Sequence[LayerStatistics],
    *,
    structure: Structure = "tree",
    population: int = 50,
    iterations: int = 1000,
    topk: float = 1.0,
    dps: bool = True,
    csp: bool = True,
    osp: bool = True,
    seed: int = 0,
    samples: int | None = 50,
    children: int = 4,
    inputs: Sequence[str] | None = None,
    weighting: Weighting = "bits",
    engine: Engine = "serial",
    workers: int = 1,
    state: str | Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> EvolvedProxy:
    """The expression over layer statistics whose bit-weighted sum ranks the bench's bit vectors best.

    Start from random valid proxies. A child comes from two parents by crossover and by mutation, each with probability
    1/2; it joins, and the worst leaves. The result depends on the seed and on `children`, never on the workers.

    - Diversity prompting (`dps`): the first parent wins a tournament, the second is the member of the upper half with
      the most different genotype; a child whose canonical form or fitness is there already is replaced by a random
      one; where fewer than half of the canonical forms are distinct, random ones replace the lower quarter.
    - Compatibility screening (`csp`): four bit vectors first, rejecting what is not finite or constant; then equal ranks on
      16 random bit vectors let an equivalent proxy's fitness be reused.
    - Operation sampling prioritisation (`osp`): see `OperationOdds`.

    Memory: the statistics, once more per worker process. Cost: one pass of an expression over them per child.

    Args:
        bench: measured bit vectors of the layers of `statistics`, in its order; for a proxy that serves several networks
            a list of them, and of their statistics: the fitness is the mean.
        topk: share of the best bit vectors that ranks are correlated on.
        iterations: children in all.
        samples: bit vectors that the fitness looks at, drawn once; None for all.
        children: made from one population before any of them joins: what can run in parallel.
        inputs: statistics that may be read; all that were measured by default.
        weighting: how bits enter: ``bits`` as published; ``rounding`` errors tell widths apart that a factor cannot.
        engine, workers: see `evaluator`.
        state: file to go on from, and to keep what was reached in after every round.

    Raises:
        InputError: layers that do not match, settings out of range, a state of another search, no valid proxy found.
    """
    benches = [bench] if isinstance(bench, BitBench) else list(bench)
    measured = [statistics] if isinstance(statistics, LayerStatistics) else list(statistics)
    _refuse_misfits(benches, measured)
    together = joined(measured)
    names = tuple(inputs) if inputs is not None else together.inputs
    for name in names:
        together.tensors(name)
    settings = Settings(structure, names, population, topk, dps, csp, osp, children, samples, seed, weighting)
    search = _Search.begin(benches, measured, settings)
    path = None if state is None else Path(state)
    if path is not None and path.exists():
        search.restore(path)
    with evaluator(together, engine, workers) as evaluate:
        search.fill(evaluate)
        while search.done < iterations:
            search.round(evaluate, min(children, iterations - search.done))
            if path is not None:
                write_atomically(path, search.to_data())
            if progress:
                progress("searching a proxy", search.done, iterations)
    return search.result(iterations)


def _refuse_misfits(benches: Sequence[BitBench], measured: Sequence[LayerStatistics]) -> None:
    if not benches or len(benches) != len(measured):
        raise InputError(f"got {len(benches)} benches and {len(measured)} statistics, expected one of each per network")
    for bench, statistics in zip(benches, measured, strict=True):
        if bench.layers != statistics.paths:
            raise InputError(
                f"bench and statistics are of different layers ({len(bench.layers)} and {len(statistics)}); measure the "
                "statistics of bench.layers, in their order"
            )


@dataclass
class _Search:
    """The state of a search."""

    settings: Settings
    key: str
    judge: Judge
    random: np.random.Generator
    odds: OperationOdds
    members: list[_Member] = field(default_factory=list)
    history: list[float] = field(default_factory=list)
    distinct: list[int] = field(default_factory=list)
    done: int = 0
    duplicates: int = 0

    @classmethod
    def begin(cls, benches: Sequence[BitBench], measured: Sequence[LayerStatistics], settings: Settings) -> _Search:
        random, tables = np.random.default_rng(settings.seed), []
        for bench, statistics in zip(benches, measured, strict=True):
            used = bench
            if settings.samples is not None and settings.samples < len(bench):
                used = bench.take(sorted(random.choice(len(bench), settings.samples, replace=False).tolist()))
            weights = bit_weights(statistics, used.widths, settings.weighting)
            tables.append(Table.of(used, random, None if settings.weighting == "bits" else weights))
        judge = Judge(tables, settings.topk, settings.csp)
        records = [sorted(map(repr, bench.records.items())) for bench in benches]
        key = hashlib.sha256(json.dumps([dataclasses.asdict(settings), FIRST, records]).encode()).hexdigest()
        return cls(settings, key, judge, random, OperationOdds.uniform())

    # -- steps ----------------------------------------------------------------------------------------------------

    def fill(self, evaluate: Evaluate) -> None:
        """Random valid members until the population is full."""
        size, tries = self.settings.population, 0
        while len(self.members) < size:
            if tries > 200 * size:
                raise InputError(f"no valid proxies among {tries} random ones of these inputs; offer other statistics")
            drawn = [self._fresh() for _ in range(size)]
            for proxy, verdict in self._evaluate(evaluate, drawn):
                if verdict.valid and len(self.members) < size:
                    self.members.append(_Member(proxy, verdict.fitness, proxy.canonical()))
            tries += size
        if not self.history:
            self._note()

    def round(self, evaluate: Evaluate, count: int) -> None:
        """`count` children, evaluated together, then joined in order."""
        made = [self._child() for _ in range(count)]
        found = self._evaluate(evaluate, made)
        if self.settings.dps:
            found = self._diversified(evaluate, found)
        for proxy, verdict in found:
            self.members.append(_Member(proxy, verdict.fitness, proxy.canonical()))
            self.members.remove(min(self.members, key=lambda member: member.fitness))
        self.done += count
        if self.settings.dps and 2 * self._forms() < len(self.members):
            self._refresh(evaluate)
        self._note()

    def _child(self) -> ProxyTree:
        random = self.random
        first, second = self._parents()
        child = crossover(first, second, random) if random.random() < 0.5 else first
        if random.random() < 0.5:
            child = mutate(child, self.settings.inputs, random, self._used_odds())
        return child

    def _parents(self) -> tuple[ProxyTree, ProxyTree]:
        ranked = sorted(self.members, key=lambda member: -member.fitness)
        upper = ranked[: max(2, len(ranked) // 2)]
        if not self.settings.dps:
            picked = self.random.choice(len(upper), 2, replace=False)
            return upper[int(picked[0])].proxy, upper[int(picked[1])].proxy
        drawn = self.random.choice(len(ranked), min(TOURNAMENT, len(ranked)), replace=False)
        first = ranked[int(drawn.min())]
        return first.proxy, max(upper, key=lambda member: distance(member.proxy, first.proxy)).proxy

    def _diversified(
        self, evaluate: Evaluate, found: list[tuple[ProxyTree, Verdict]]
    ) -> list[tuple[ProxyTree, Verdict]]:
        """Children with what is in the population already exchanged for random proxies."""
        forms = {member.canonical for member in self.members}
        scores = {round(member.fitness, 9) for member in self.members}
        kept: list[tuple[ProxyTree, Verdict]] = []
        for proxy, verdict in found:
            form, score = proxy.canonical(), round(verdict.fitness, 9)
            if verdict.valid and form not in forms and score not in scores:
                kept.append((proxy, verdict))
                forms.add(form)
                scores.add(score)
        missing = len(found) - len(kept)
        self.duplicates += missing
        return [*kept, *self._evaluate(evaluate, [self._fresh(forms) for _ in range(missing)])]

    def _refresh(self, evaluate: Evaluate) -> None:
        """Random proxies in place of the lower quarter; the best stays."""
        ranked = sorted(self.members, key=lambda member: -member.fitness)
        count = len(ranked) // 4
        drawn = self._evaluate(evaluate, [self._fresh({m.canonical for m in ranked}) for _ in range(count)])
        new = [_Member(proxy, verdict.fitness, proxy.canonical()) for proxy, verdict in drawn]
        self.members = [*ranked[: len(ranked) - count], *new]

    def _fresh(self, taken: set[str] | None = None) -> ProxyTree:
        for _ in range(TRIES):
            proxy = random_proxy(self.settings.structure, self.settings.inputs, self.random, self._used_odds())
            if taken is None or proxy.canonical() not in taken:
                break
        return proxy

    def _used_odds(self) -> OperationOdds | None:
        return self.odds if self.settings.osp else None

    def _evaluate(self, evaluate: Evaluate, proxies: list[ProxyTree]) -> list[tuple[ProxyTree, Verdict]]:
        found = []
        for proxy, values in zip(proxies, evaluate(proxies) if proxies else [], strict=True):
            verdict = self.judge(values)
            self.odds.reward_(proxy, verdict.valid)
            found.append((proxy, verdict))
        return found

    def _forms(self) -> int:
        return len({member.canonical for member in self.members})

    def _note(self) -> None:
        self.history.append(max(member.fitness for member in self.members))
        self.distinct.append(self._forms())

    # -- state ----------------------------------------------------------------------------------------------------

    def to_data(self) -> dict[str, Any]:
        """Everything that the next round depends on."""
        return {
            "layerwright_search": 1,
            "key": self.key,
            "done": self.done,
            "random": self.random.bit_generator.state,
            "odds": self.odds.weights,
            "members": [[member.proxy.genotype(), member.fitness] for member in self.members],
            "known": self.judge.known,
            "counts": self.judge.counts,
            "duplicates": self.duplicates,
            "history": self.history,
            "distinct": self.distinct,
        }

    def restore(self, path: Path) -> None:
        """Go on from a saved state.

        Raises:
            InputError: the file is of another search, or none.
        """
        try:
            data = json.loads(path.read_text())
            if data["layerwright_search"] != 1:
                raise KeyError("version")
            if data["key"] != self.key:
                raise InputError(f"{path} is the state of another search (bench or settings differ); give another file")
            self.random.bit_generator.state = data["random"]
            self.odds = odds_from_data(data["odds"])
            pairs = [(ProxyTree.from_genotype(genotype), float(fitness)) for genotype, fitness in data["members"]]
            self.members = [_Member(proxy, fitness, proxy.canonical()) for proxy, fitness in pairs]
            self.judge.known, self.judge.counts = dict(data["known"]), dict(data["counts"])
            self.done, self.duplicates = int(data["done"]), int(data["duplicates"])
            self.history, self.distinct = list(data["history"]), list(data["distinct"])
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise InputError(f"{path} is no state of a proxy search ({error}); give another file") from error

    def result(self, iterations: int) -> EvolvedProxy:
        ranked = sorted(self.members, key=lambda member: -member.fitness)
        return EvolvedProxy(
            best=dataclasses.replace(ranked[0].proxy, weighting=self.settings.weighting),
            fitness=ranked[0].fitness,
            history=tuple(self.history),
            distinct=tuple(self.distinct),
            counts={**self.judge.counts, "duplicates": self.duplicates},
            odds=dict(self.odds.weights),
            population=tuple((member.proxy.to_string(), member.fitness) for member in ranked),
            settings={**dataclasses.asdict(self.settings), "iterations": iterations},
        )
