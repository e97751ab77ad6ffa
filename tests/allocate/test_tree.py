from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwright.allocate.tree import best_splits, build_tree, select
from layerwright.core.errors import InputError
from layerwright.core.option import OptionTable
from oracles.allocate import all_covers, layered_table


def tree_of(table: OptionTable):
    return build_tree([o.covers for o in table.options], np.array([o.cost.bytes for o in table.options]))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 7), st.integers(1, 3), st.integers(0, 3), st.booleans())
def test_select_is_the_least_of_all_covers(seed, layers, options, per_block, ties):
    table = layered_table(seed, layers, options, per_block=per_block, ties=ties)
    weight = np.random.default_rng(seed).normal(size=len(table))
    value, chosen = select(tree_of(table), weight)
    index = {id(o): i for i, o in enumerate(table.options)}
    expected = min(sum(weight[index[id(o)]] for o in cover) for cover in all_covers(table))
    assert value == pytest.approx(expected, abs=1e-12)
    assert weight[chosen].sum() == pytest.approx(expected, abs=1e-12)
    covered = [path for i in chosen for path in table.options[i].covers]
    assert sorted(covered) == sorted(table.layers)


def test_three_levels_and_a_set_that_cannot_be_split():
    # {a, b, c} around {a, b} around a, b; c has no option of its own, so the outer set cannot be split.
    covers = [("a", "b", "c"), ("a", "b"), ("a",), ("b",), ("d",)]
    tree = build_tree(covers, np.zeros(5))
    assert tree.splits.tolist() == [False, True, False, False, False]
    assert tree.parent.tolist() == [-1, 0, 1, 1, -1]
    value, chosen = select(tree, np.array([9.0, 1.0, 1.0, 1.0, 2.0]))
    assert (value, chosen.tolist()) == (11.0, [0, 4])


def test_three_levels_that_can_be_split():
    covers = [("a", "b", "c"), ("a", "b"), ("a",), ("b",), ("c",), ("a",)]
    tree = build_tree(covers, np.zeros(6))
    assert select(tree, np.array([9.0, 5.0, 3.0, 1.0, 2.0, 4.0]))[1].tolist() == [2, 3, 4]
    assert select(tree, np.array([9.0, 2.0, 3.0, 1.0, 2.0, 4.0]))[1].tolist() == [1, 4]
    assert select(tree, np.array([4.0, 2.0, 3.0, 1.0, 2.0, 4.0]))[1].tolist() == [0]
    splits = best_splits(tree, np.array([4.0, 2.0, 3.0, 1.0, 2.0, 2.5]))
    assert [sorted(part.tolist()) for part in splits] == [[1, 4], [3, 5]]


def test_equal_weights_take_the_preferred_option():
    tree = build_tree([("a",), ("a",), ("a",)], np.array([3.0, 1.0, 2.0]))
    assert select(tree, np.zeros(3))[1].tolist() == [1]


def test_the_order_of_covers_does_not_matter():
    tree = build_tree([("a", "b"), ("b", "a")], np.zeros(2))
    assert len(tree) == 1


def test_overlapping_options_are_refused_by_name():
    with pytest.raises(InputError, match=r"\{a, b\} and for \{b, c\} overlap|\{b, c\} and for \{a, b\} overlap"):
        build_tree([("a", "b"), ("b", "c")], np.zeros(2))


def test_a_layer_covered_twice_is_refused():
    with pytest.raises(InputError, match="names a layer twice"):
        build_tree([("a", "a")], np.zeros(1))
