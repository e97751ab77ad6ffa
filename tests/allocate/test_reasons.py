from __future__ import annotations

import numpy as np

from layerwright.allocate import ALLOCATORS, integer
from layerwright.allocate.problem import make_problem
from layerwright.allocate.reasons import explain
from layerwright.core.cost import Cost
from layerwright.core.option import Option, OptionTable
from layerwright.core.treatment import Drop, Quantize
from oracles.allocate import layered_table

ROWS = (
    Option("a", (), Cost(bytes=1600.0, ms=4.0), 0.0),
    Option("a", (Quantize(8),), Cost(bytes=800.0, ms=3.0), 0.008),
    Option("a", (Quantize(4),), Cost(bytes=400.0, ms=2.0), 0.02),
    Option("a", (Quantize(2),), Cost(bytes=200.0, ms=1.0), 0.4),
)


def test_the_numbers_are_damages_per_unit():
    problem = make_problem(OptionTable(ROWS), {"bytes": 500.0})
    # Chosen: 0.02 / 1200 saved; to 2 bits: 0.38 / 200; back to 8 bits: 0.012 / 400, to kept: 0.02 / 1200.
    assert explain(problem, np.array([2])) == {
        "a": "int4 gptq: 1.7e-05 damage per byte saved; next cheaper int2 gptq costs 0.0019, next better int8 gptq "
        "would save 3e-05"
    }
    assert explain(problem, np.array([0]))["a"] == (
        "kept: the least damage of its 4 options; next cheaper int8 gptq costs 1e-05"
    )


def test_the_unit_is_the_first_limited_resource():
    problem = make_problem(OptionTable(ROWS), {"ms": 2.0})
    assert explain(problem, np.array([2]))["a"].startswith("int4 gptq: 0.01 damage per ms saved")


def test_an_only_option_says_so():
    problem = make_problem(OptionTable((Option("b", (Drop(),), Cost(), 0.25, ("b.q", "b.k")),)), {})
    assert explain(problem, np.array([0])) == dict.fromkeys(("b", "b.q", "b.k"), "drop: its only option, 0.25 damage")


def test_every_decided_layer_has_one_line_from_every_allocator():
    table = layered_table(2, 18, 4, per_block=2, ties=True)
    for name in ALLOCATORS:
        found = ALLOCATORS.get(name)(table, {"bytes": 0.95 * table.original.bytes})
        assert set(found.reasons) >= set(table.layers)
        assert all(why and "\n" not in why for why in found.reasons.values())
        assert found.method == name


def test_reasons_do_not_depend_on_the_order_of_the_rows():
    shuffled = OptionTable(tuple(reversed(ROWS)))
    limits = {"bytes": 500.0}
    assert integer(OptionTable(ROWS), limits).reasons == integer(shuffled, limits).reasons
