from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwright.allocate import filter_target, integer, merge_ties
from layerwright.core.cost import Cost
from layerwright.core.errors import InputError
from layerwright.core.option import Option, OptionTable
from layerwright.core.treatment import Drop, LowRank, Quantize
from oracles.allocate import layered_table, merged_by_hand


def fused(per_layer: dict[str, tuple[int, ...]]) -> OptionTable:
    rows = [
        Option(name, (Quantize(b),), Cost(bytes=float(b), ms=1.0), 2.0**-b * (1 + ord(name[-1]) % 7))
        for name, bits in per_layer.items()
        for b in bits
    ]
    return OptionTable(tuple(rows), Cost(bytes=1.0), Cost(bytes=99.0), 3.0)


def test_damages_and_costs_add_up_and_what_one_lacks_is_left_out():
    table = fused({"b.q": (8, 4, 2), "b.k": (8, 4), "b.v": (4, 8, 2), "b.o": (8, 2)})
    merged = merge_ties(table, [["b.q", "b.k", "b.v"], ["b.o"]])
    found = {(frozenset(o.covers), o.treatments): (o.damage, o.cost.bytes) for o in merged.options}
    expected = merged_by_hand(table, [["b.q", "b.k", "b.v"]])
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value)
    assert {o.layer for o in merged.options} == {"b.q", "b.o"}
    assert (merged.fixed, merged.original, merged.base_loss) == (table.fixed, table.original, table.base_loss)
    assert merged.options[0].cost.ms == 3.0


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 9), st.integers(1, 4), st.integers(0, 3))
def test_random_groups_equal_the_sums_by_hand(seed, layers, options, per_block):
    table = layered_table(seed, layers, options, per_block=per_block)
    singles = [p for p in table.layers if not per_block or p.startswith("b0.")]
    group = singles[:3]
    merged = merge_ties(table, [group])
    found = {(frozenset(o.covers), o.treatments): (o.damage, o.cost.bytes) for o in merged.options}
    expected = merged_by_hand(table, [group])
    assert found.keys() == expected.keys()
    assert all(found[key] == pytest.approx(expected[key]) for key in expected)
    assert set(merged.layers) == set(table.layers)


def test_a_block_around_the_group_stays_and_is_still_a_choice():
    table = fused({"b.q": (8, 4), "b.k": (8, 4), "b.o": (8, 4)})
    drop = Option("b", (Drop(),), Cost(), 0.001, ("b.q", "b.k", "b.o"))
    merged = merge_ties(OptionTable((*table.options, drop)), [["b.q", "b.k"]])
    assert drop in merged.options
    assert [o.layer for o in integer(merged, {"bytes": 5.0}).chosen] == ["b"]
    assert {o.covers for o in integer(merge_ties(table, [["b.q", "b.k"]]), {"bytes": 20.0}).chosen} == {
        ("b.q", "b.k"),
        ("b.o",),
    }


def test_tied_layers_can_be_tied_further():
    rows = [Option("e", (Quantize(b),), Cost(bytes=b), 0.1, ("e", "h")) for b in (8, 4)]
    rows += [Option("x", (Quantize(b),), Cost(bytes=b), 0.2) for b in (4, 8)]
    merged = merge_ties(OptionTable(tuple(rows)), [["x", "e", "h"]])
    assert {(o.covers, o.cost.bytes) for o in merged.options} == {(("e", "h", "x"), 16.0), (("e", "h", "x"), 8.0)}
    assert {o.layer for o in merged.options} == {"x"}


def test_bad_groups():
    table = fused({"b.q": (8,), "b.k": (4,), "b.v": (8,)})
    with pytest.raises(InputError, match=r"unknown layer 'b\.p'.*did you mean"):
        merge_ties(table, [["b.q", "b.p"]])
    with pytest.raises(InputError, match=r"b\.q stands in two groups"):
        merge_ties(table, [["b.q", "b.k"], ["b.q", "b.v"]])
    with pytest.raises(InputError, match=r"b\.q, b\.k have no treatment in common"):
        merge_ties(table, [["b.q", "b.k"]])
    tied = Option("b.q", (Quantize(8),), Cost(), 0.0, ("b.q", "b.x"))
    with pytest.raises(InputError, match="part of a group"):
        merge_ties(OptionTable((*table.options, tied)), [["b.q", "b.v"]])


def test_targets_remove_what_they_cannot_load():
    rows = [
        Option("a", t, Cost(), 0.0)
        for t in (
            (),
            (Quantize(4, 32),),
            (Quantize(3, 32),),
            (Quantize(4, 32, False),),
            (LowRank(4),),
            (Quantize(8, 64),),
        )
    ]
    rows.append(Option("b", (Drop(),), Cost(), 0.0, ("a",)))
    left = filter_target(OptionTable(tuple(rows)), "gguf")
    assert [o.treatments for o in left.options] == [(), (Quantize(4, 32),), (Drop(),)]
    assert len(filter_target(OptionTable(tuple(rows)), "layerwright")) == len(rows)


def test_a_layer_that_loses_everything_is_named():
    drop = Option("blk", (Drop(),), Cost(), 0.0, ("blk.a",))
    rows = (Option("blk.a", (Quantize(3),), Cost(), 0.0), drop)
    with pytest.raises(InputError, match=r"no option of blk\.a is left: gguf cannot load 3-bit"):
        filter_target(OptionTable(rows), "gguf")
    with pytest.raises(InputError, match="unknown target 'ggml'; did you mean"):
        filter_target(OptionTable(rows), "ggml")
