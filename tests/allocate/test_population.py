from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwright.allocate import evolution
from layerwright.allocate.population import SPLIT, _Pool
from layerwright.allocate.problem import make_problem
from layerwright.allocate.tree import select
from layerwright.core.cost import total
from layerwright.core.errors import InputError
from oracles.allocate import all_covers, best, layered_table


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 4), st.integers(0, 3), st.booleans())
def test_random_genes_are_covers_and_their_sums_are_right(seed, layers, options, per_block, ties):
    table = layered_table(seed, layers, options, per_block=per_block, ties=ties)
    problem = make_problem(table, {"bytes": 1e9, "ms": 1e9})
    pool = _Pool(problem, None, {})
    genes = pool.draw(20, np.random.default_rng(seed))
    values, totals = pool.measure(genes), pool.totals(genes)
    covers = {tuple(sorted(map(id, cover))) for cover in all_covers(table)}
    for row, chosen in enumerate(pool.decode(genes)):
        picked = [table.options[i] for i in chosen.tolist()]
        assert tuple(sorted(map(id, picked))) in covers
        cost = total(o.cost for o in picked)
        np.testing.assert_allclose(totals[row], [cost.bytes, cost.ms], atol=1e-6)
        assert values[row] == pytest.approx(sum(o.damage for o in picked), abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(2, 4), st.integers(0, 3), st.floats(0.1, 0.9))
def test_repair_reaches_the_limits_wherever_layers_alone_can(seed, layers, options, per_block, share):
    table = layered_table(seed, layers, options, per_block=per_block)
    free = make_problem(table, {})
    kept = np.array([o.cost.bytes if o.treatments else np.inf for o in table.options])
    cheapest = select(free.tree, np.where([len(o.covers) == 1 for o in table.options], kept, 1e12))[0]
    limit = max(share * table.original.bytes, cheapest + table.fixed.bytes)
    problem = make_problem(table, {"bytes": limit})
    pool, random = _Pool(problem, None, {}), np.random.default_rng(seed)
    genes = pool.draw(10, random)
    split = np.where(problem.tree.splits, SPLIT, genes)
    before = split.copy()
    repaired = pool.repair(split, random)
    assert np.isfinite(pool.measure(repaired)).all()
    assert (split == before).all()
    fitting = np.isfinite(pool.measure(before))
    assert (repaired[fitting] == before[fitting]).all()


def test_encode_and_decode_are_inverse():
    table = layered_table(4, 6, 3, per_block=3, ties=True)
    pool = _Pool(make_problem(table, {}), None, {})
    for cover in list(all_covers(table))[::7]:
        chosen = np.array(sorted(table.options.index(o) for o in cover))
        assert pool.decode(pool.encode(chosen)[None])[0].tolist() == chosen.tolist()


def test_it_finds_the_optimum_of_a_small_table():
    table = layered_table(6, 6, 4, per_block=3)
    limits = {"bytes": 0.4 * table.original.bytes, "ms": 0.5 * table.original.ms}
    assert evolution(table, limits, seed=0).damage == pytest.approx(best(table, limits), rel=1e-9)


def test_the_seed_decides():
    table = layered_table(7, 60, 8, per_block=6)
    limits = {"bytes": 0.3 * table.original.bytes}
    first, again, other = (evolution(table, limits, seed=s, generations=5) for s in (1, 1, 2))
    assert first == again
    assert first.chosen != other.chosen


def test_more_generations_are_no_worse():
    table = layered_table(8, 40, 8)
    limits = {"bytes": 0.3 * table.original.bytes}
    few, many = (evolution(table, limits, seed=3, generations=g).damage for g in (0, 40))
    assert many <= few


def test_a_damage_that_does_not_add_up_is_searched_too():
    """Two layers damage only together: the sum of single damages would take both."""
    table = layered_table(9, 5, 3)
    limits = {"bytes": 0.6 * table.original.bytes}
    calls = []

    def together(chosen):
        calls.append(chosen)
        treated = [o for o in chosen if o.treatments]
        return sum(o.damage for o in chosen) * len(treated) ** 2

    found = evolution(table, limits, seed=0, objective=together)
    every = [c for c in all_covers(table) if total([table.fixed, *(o.cost for o in c)]).bytes <= limits["bytes"]]
    assert len(calls) == len({tuple(map(id, c)) for c in calls})
    calls.clear()
    assert together(found.chosen) == pytest.approx(min(map(together, every)))


@pytest.mark.parametrize("bad", [{"population": 1}, {"mutation": 2.0}, {"elite": 64}, {"tournament": 0}])
def test_settings_out_of_range(bad):
    with pytest.raises(InputError, match="evolution: got"):
        evolution(layered_table(0, 2, 2), {}, **bad)
