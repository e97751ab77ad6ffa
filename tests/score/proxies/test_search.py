from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwright.core.errors import InputError, MissingExtraError
from layerwright.score.proxies import BitBench, ProxyTree, as_proxy, evolve_proxy, spearman
from layerwright.score.proxies.search import Judge, Table, crossover, distance, mutate, random_proxy
from layerwright.score.proxies.search.genetics import OperationOdds
from layerwright.score.proxies.search.screening import WORST
from layerwright.score.proxies.weighting import rounding_errors
from oracles.proxies import made_up

STATISTICS = made_up(5)
SEEDS = st.integers(0, 10**6)


def bench(statistics: Any = STATISTICS, count: int = 60, seed: int = 0) -> BitBench:
    """A loss that falls with bits where gradient times weight is large, faster at low widths."""
    truth = np.array([float((g * w).abs().mean()) for g, w in zip(*(statistics.lists[n] for n in "GW"), strict=True)])
    everything = list(itertools.product((2, 3, 4), repeat=len(statistics)))
    chosen = np.random.default_rng(seed).permutation(len(everything))[:count]
    vectors = [everything[i] for i in chosen]
    return BitBench(statistics.paths, {v: float((truth / 4.0 ** np.array(v)).sum()) for v in vectors})


BENCH = bench()


def search(**settings: Any) -> Any:
    return evolve_proxy(BENCH, STATISTICS, **{"iterations": 60, "population": 12, "samples": None, **settings})


def test_evolution_finds_what_the_table_was_made_of() -> None:
    found = search(iterations=150)
    assert found.fitness > 0.85
    assert len(found.population) == 12
    assert list(found.history) == sorted(found.history), "the best never gets worse"
    scores = np.array([found.best(STATISTICS, bits) for bits in BENCH.records])
    assert spearman(scores, BENCH.quality) == pytest.approx(found.fitness, abs=1e-3)
    unseen = bench(seed=1)
    assert spearman(np.array([found.best(STATISTICS, b) for b in unseen.records]), unseen.quality) > 0.7


def test_rounding_errors_in_place_of_bits() -> None:
    """A table made of a statistic and the rounding errors is found with that weighting, and not by factors of bits."""
    whole = dataclasses.replace(STATISTICS, weights=tuple(w.unsqueeze(0) for w in STATISTICS.lists["W"]))
    errors = rounding_errors(whole, (2, 3, 4))
    slopes = np.array([float(g.abs().mean()) for g in STATISTICS.lists["G"]])
    layers = np.arange(len(errors))
    records = {bits: float(slopes @ errors[layers, np.array(bits) - 2]) for bits in BENCH.records}
    table = BitBench(STATISTICS.paths, records)
    found = evolve_proxy(table, whole, iterations=60, population=12, samples=None, weighting="rounding")
    assert found.best.weighting == found.settings["weighting"] == "rounding"
    assert found.fitness > 0.95
    scores = np.array([found.best(whole, bits) for bits in records])
    assert spearman(scores, table.quality) == pytest.approx(found.fitness, abs=1e-3)
    plain = dataclasses.replace(found.best, weighting="bits")
    assert spearman(np.array([plain(whole, bits) for bits in records]), table.quality) < found.fitness
    assert ProxyTree.from_genotype(json.loads(json.dumps(found.best.genotype()))) == found.best
    with pytest.raises(InputError, match="whole weights"):
        evolve_proxy(table, STATISTICS, weighting="rounding")
    with pytest.raises(InputError, match="weighting"):
        evolve_proxy(table, whole, weighting="error")  # type: ignore[arg-type]


@pytest.mark.parametrize("structure", ["linear", "tree", "dag"])
def test_the_seed_decides_everything(structure: Any) -> None:
    first, again, other = (search(structure=structure, seed=seed) for seed in (1, 1, 2))
    assert first == again and first != other
    assert {ProxyTree.from_string(text).canonical() for text, _ in first.population}
    assert len(first.population) == 12 and first.best.structure == structure


def test_workers_change_nothing() -> None:
    alone = search(iterations=16, population=6)
    together = search(iterations=16, population=6, engine="processes", workers=2)
    assert alone == together


def test_a_search_resumes_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    straight = search(iterations=48)
    search(iterations=20, state=state)
    assert json.loads(state.read_text())["done"] == 20
    assert list(tmp_path.iterdir()) == [state]
    resumed = search(iterations=48, state=state)
    assert resumed == straight
    assert search(iterations=48, state=state) == straight, "a finished search is read, not repeated"
    with pytest.raises(InputError, match="state of another search"):
        search(state=state, seed=5)
    with pytest.raises(InputError, match="state of another search"):
        evolve_proxy(bench(seed=3), STATISTICS, iterations=48, population=12, samples=None, state=state)
    state.write_text("{}")
    with pytest.raises(InputError, match="no state of a proxy search"):
        search(state=state)


def test_screening_spares_full_evaluations_and_finds_the_same_best_among_the_same() -> None:
    screened, plain = search(), search(csp=False)
    assert screened.counts["evaluated"] < plain.counts["evaluated"]
    assert plain.counts["rejected"] == plain.counts["reused"] == 0
    random = np.random.default_rng(0)
    values = [random_proxy("tree", "GWHV", random).layer_values(STATISTICS).tolist() for _ in range(150)]
    judges = [Judge([Table.of(BENCH, np.random.default_rng(0))], screen=screen) for screen in (True, False)]
    best = [max(judge(v).fitness for v in values) for judge in judges]
    assert best[0] == best[1]
    assert judges[0].counts["evaluated"] < judges[1].counts["evaluated"] == 150


@pytest.mark.parametrize("values", [[0.0] * 5, [float("nan")] * 5, [float("inf")] + [1.0] * 4, [1e12] * 5])
def test_early_rejection(values: list[float]) -> None:
    judge = Judge([Table.of(BENCH, np.random.default_rng(0))])
    assert judge(values).how == "rejected" and judge(values).fitness == WORST
    assert not Judge(judge.tables, screen=False)(values).valid


def test_equivalent_proxies_are_evaluated_once() -> None:
    judge = Judge([Table.of(BENCH, np.random.default_rng(0))])
    values = np.array([0.3, 0.1, 0.5, 0.2, 0.4])
    assert judge(values).how == "evaluated"
    assert judge(values * 7).how == "reused" and judge(values * 7).fitness == judge(values).fitness
    assert judge(-values).how == "evaluated"
    assert judge(-values).fitness == pytest.approx(-judge(values).fitness)


def test_diversity_keeps_forms_apart() -> None:
    diverse, plain = search(iterations=120, seed=3), search(iterations=120, dps=False, seed=3)
    assert diverse.distinct[-1] >= 1.2 * plain.distinct[-1]
    scores = [round(fitness, 9) for _, fitness in diverse.population]
    assert len(diverse.population) == len(plain.population) == 12
    assert len(set(scores)) > len({round(f, 9) for _, f in plain.population})


def test_operations_are_rewarded() -> None:
    odds = OperationOdds.uniform()
    good, bad = ProxyTree.from_string("abs(G)"), ProxyTree.from_string("disconnect(G)")
    for _ in range(60):
        odds.reward_(good, True)
        odds.reward_(bad, False)
    assert odds.weights["abs"] > 0.99 and odds.weights["disconnect"] == odds.floor
    random = np.random.default_rng(0)
    drawn = [odds.draw(1, random) for _ in range(2000)]
    assert drawn.count("abs") > 5 * drawn.count("disconnect") > 0
    assert {odds.draw(2, random) for _ in range(50)} <= set(odds.weights)


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.sampled_from(["linear", "tree", "dag"]))
def test_mutation_changes_one_position_and_crossover_invents_none(seed: int, structure: Any) -> None:
    random = np.random.default_rng(seed)
    first, second = (random_proxy(structure, "AGWHV", random) for _ in range(2))
    assert distance(first, mutate(first, "AGWHV", random)) <= 1
    child = crossover(first, second, random)
    for slot, value in enumerate(child.inputs):
        assert value in (first.inputs[slot], second.inputs[slot])
    for slot, step in enumerate(child.steps):
        assert step in (first.steps[slot], second.steps[slot])
    assert distance(first, child) + distance(child, second) == distance(first, second)
    assert distance(first, first) == 0


def test_several_networks_share_a_proxy() -> None:
    other = made_up(4, seed=9)
    found = evolve_proxy([BENCH, bench(other)], [STATISTICS, other], iterations=80, population=12, samples=None)
    parts = [
        spearman(np.array([found.best(s, b) for b in table.records]), table.quality)
        for s, table in ((STATISTICS, BENCH), (other, bench(other)))
    ]
    assert found.fitness == pytest.approx(float(np.mean(parts)), abs=1e-3) and min(parts) > 0.6


def test_a_sample_of_the_records_serves_the_fitness() -> None:
    small = search(samples=15, iterations=30)
    assert small.settings["samples"] == 15 and small.fitness > 0.5


def test_a_found_proxy_is_a_file_for_the_scorer(tmp_path: Path) -> None:
    found = search(iterations=10)
    path = found.save(tmp_path / "proxy.json")
    proxy = as_proxy(path)
    assert proxy.name == found.best.to_string() and set(proxy.needs) <= set("AGWHV")
    np.testing.assert_array_equal(proxy.gains(STATISTICS, (2, 4)), found.best.gains(STATISTICS, (2, 4)))


def test_bad_input_is_refused() -> None:
    with pytest.raises(InputError, match="different layers"):
        evolve_proxy(BENCH, made_up(4), iterations=4)
    with pytest.raises(InputError, match="one of each per network"):
        evolve_proxy([BENCH, BENCH], [STATISTICS], iterations=4)
    with pytest.raises(InputError, match="population=2"):
        search(population=2)
    with pytest.raises(InputError, match="structure"):
        search(structure="forest")
    with pytest.raises(InputError, match="unknown statistic 'Q'"):
        search(inputs=("Q",))
    with pytest.raises(InputError, match="unknown engine"):
        search(engine="threads")
    with pytest.raises(InputError, match="workers"):
        search(workers=0)
    with pytest.raises(InputError, match="inputs: got none"):
        random_proxy("tree", (), np.random.default_rng(0))


@pytest.mark.slow
def test_ray_is_asked_for_by_name() -> None:
    try:
        import ray  # type: ignore[import-not-found]  # noqa: F401
    except ImportError:
        with pytest.raises(MissingExtraError, match=r"layerwright\[search\]"):
            search(engine="ray", workers=2)
    else:
        assert search(iterations=8, population=6, engine="ray", workers=2) == search(iterations=8, population=6)
