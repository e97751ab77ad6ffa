from __future__ import annotations

import itertools
import math

import pytest

from layerwright.allocate import clusters, integer
from layerwright.allocate.clustering import cluster_layers
from layerwright.allocate.problem import make_problem
from layerwright.core.cost import Cost, total
from layerwright.core.errors import BudgetError, InputError
from layerwright.core.option import Option, OptionTable
from layerwright.core.treatment import Drop, Quantize
from oracles.allocate import layered_table


def two_kinds(layers: int, per_block: int = 0) -> OptionTable:
    """Even layers are a thousand times as sensitive as odd ones."""
    rows = []
    for i in range(layers):
        scale = 1.0 if i % 2 == 0 else 1e-3
        name = f"b{i // per_block}.l{i % per_block}" if per_block else f"l{i}"
        for bits in (8, 4, 2):
            rows.append(Option(name, (Quantize(bits),), Cost(bytes=bits), scale * 4.0**-bits * (1 + 0.01 * i)))
    for b in range(layers // per_block if per_block else 0):
        covers = tuple(f"b{b}.l{i}" for i in range(per_block))
        rows.append(Option(f"b{b}", (Drop(),), Cost(), 0.004 * (b + 1), covers))
    return OptionTable(tuple(rows))


@pytest.mark.parametrize("method", ["hierarchical", "kmeans"])
def test_similar_layers_share_a_cluster(method):
    problem = make_problem(two_kinds(8), {})
    cluster, _ = cluster_layers(problem, 2, method, seed=0)
    assert len(set(cluster[::2])) == 1
    assert len(set(cluster[1::2])) == 1
    assert cluster[0] != cluster[1]


def brute(table: OptionTable, groups: list[list[str]], limit: float) -> float:
    """One treatment per group, every subset of the blocks dropped."""
    drops = [o for o in table.options if o.treatments == (Drop(),)]
    forms = [(Quantize(b),) for b in (8, 4, 2)]
    by_key = {(o.layer, o.treatments): o for o in table.options}
    found = math.inf
    for gone in itertools.chain.from_iterable(itertools.combinations(drops, k) for k in range(len(drops) + 1)):
        dropped = {path for o in gone for path in o.covers}
        for pick in itertools.product(forms, repeat=len(groups)):
            rows = [
                by_key[path, t] for group, t in zip(groups, pick, strict=True) for path in group if path not in dropped
            ]
            if total(o.cost for o in (*rows, *gone)).bytes <= limit:
                found = min(found, sum(o.damage for o in (*rows, *gone)))
    return found


@pytest.mark.parametrize("per_block", [0, 2, 4])
@pytest.mark.parametrize("limit", [16.0, 22.0, 31.0, 48.0, 64.0])
def test_it_is_exact_over_the_clusters(per_block, limit):
    table = two_kinds(8, per_block)
    names = list(table.layers)
    found = clusters(table, {"bytes": limit}, count=2)
    assert found.damage == pytest.approx(brute(table, [names[::2], names[1::2]], limit), rel=1e-6)
    for group in (names[::2], names[1::2]):
        assert len({o.treatments for o in found.chosen if o.layer in group}) <= 1


def test_more_clusters_than_layers_is_the_free_optimum():
    table = layered_table(3, 12, 4, per_block=3)
    limits = {"bytes": 0.4 * table.original.bytes}
    assert clusters(table, limits, count=100).damage == pytest.approx(integer(table, limits).damage, rel=2e-6)


def test_kmeans_takes_its_seed():
    table = layered_table(4, 30, 1)
    rows = [
        Option(f"l{i}", (Quantize(b),), Cost(bytes=b), 4.0**-b * math.exp(math.sin(7.3 * i)))
        for i in range(30)
        for b in (8, 4, 2)
    ]
    table = OptionTable(tuple(rows))
    first, again = (clusters(table, {"bytes": 120.0}, count=5, method="kmeans", seed=s) for s in (3, 3))
    assert first == again


def test_layers_with_other_options_are_never_mixed():
    rows = [
        Option(f"l{i}", (Quantize(b),), Cost(bytes=b), 1.0) for i in range(4) for b in ((8, 4) if i < 2 else (6, 2))
    ]
    cluster, _ = cluster_layers(make_problem(OptionTable(tuple(rows)), {}), 1, "hierarchical", 0)
    assert set(cluster[:2]).isdisjoint(cluster[2:])


def test_bad_input():
    with pytest.raises(InputError, match="count=0"):
        clusters(two_kinds(4), {}, count=0)
    with pytest.raises(InputError, match="method='dbscan'"):
        clusters(two_kinds(4), {}, method="dbscan")


def test_what_only_single_layers_can_reach_is_refused():
    # One cluster: (4, 9) or (9, 4) for both layers, never one of each.
    forms = ((Quantize(4),), 4.0, 9.0), ((Quantize(8),), 9.0, 4.0)
    rows = [Option(n, t, Cost(bytes=b, ms=m), 1.0) for n in "ac" for t, b, m in forms]
    table = OptionTable(tuple(rows))
    limits = {"bytes": 13.0, "ms": 13.0}
    assert integer(table, limits).cost.bytes == 13.0
    with pytest.raises(BudgetError, match="one treatment for each of 1 clusters"):
        clusters(table, limits, count=1)
