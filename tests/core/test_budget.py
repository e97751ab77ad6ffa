from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerwright.core.budget import Budget, Limit
from layerwright.core.cost import Cost
from layerwright.core.errors import BudgetError


@pytest.mark.parametrize(
    ("text", "limits"),
    [
        ("bits=4.25", [("bits", 4.25, "absolute")]),
        ("size=0.4x", [("size", 0.4, "relative")]),
        ("size=40%", [("size", 0.4, "relative")]),
        ("size=500MB", [("size", 5e8, "absolute")]),
        ("size=500 mb", [("size", 5e8, "absolute")]),
        ("size=2GiB", [("size", 2 * 2**30, "absolute")]),
        ("size=7KiB", [("size", 7 * 1024, "absolute")]),
        ("size=12345", [("size", 12345, "absolute")]),
        ("params=7g", [("params", 7e9, "absolute")]),
        ("flops=1.5e12", [("flops", 1.5e12, "absolute")]),
        ("ms=0.6x", [("ms", 0.6, "relative")]),
        ("ms=12.5", [("ms", 12.5, "absolute")]),
        ("kv=0.5x", [("kv", 0.5, "relative")]),
        ("kv=.5x", [("kv", 0.5, "relative")]),
        (" SIZE = 0.4X , ms=0.8x ,", [("size", 0.4, "relative"), ("ms", 0.8, "relative")]),
        ("bits=1", [("bits", 1.0, "absolute")]),
        ("bits=32", [("bits", 32.0, "absolute")]),
        ("size=1.2x", [("size", 1.2, "relative")]),
    ],
)
def test_what_is_read(text, limits):
    assert [(limit.name, limit.value, limit.unit) for limit in Budget.parse(text)] == limits


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected one like bits=4.25"),
        (" , ", "expected one like bits=4.25"),
        ("4.25", "has no '='"),
        ("bits", "has no '='"),
        ("bits:4", "has no '='"),
        ("bit=4", "unknown budget 'bit'; did you mean bits"),
        ("memory=1GB", "unknown budget 'memory'"),
        ("=4", "unknown budget ''"),
        ("bits=", "not a positive number"),
        ("bits=four", "not a positive number"),
        ("bits=-4", "not a positive number"),
        ("size=nan", "not a positive number"),
        ("size=inf", "not a positive number"),
        ("size=0.4.1x", "not a positive number"),
        ("size=1e", "unknown unit"),
        ("bits=4=5", "not a positive number"),
        ("bits=0", "must be above zero"),
        ("size=0x", "must be above zero"),
        ("size=0%", "must be above zero"),
        ("bits=0.5x", "bits is an absolute number"),
        ("bits=50%", "bits is an absolute number"),
        ("bits=4MB", "unknown unit 'mb'"),
        ("ms=4k", "unknown unit 'k'"),
        ("size=4TB", "unknown unit 'tb'"),
        ("bits=0.5", "outside 1..32"),
        ("bits=33", "outside 1..32"),
        ("size=0.4", "looks relative; write size=0.4x"),
        ("ms=1", "looks relative; write ms=1x"),
        ("size=0.4x,size=0.5x", "limits bytes twice"),
        ("bits=4,size=0.4x", "limits bytes twice"),
        ("bits=4,,ms=abc", "not a positive number"),
    ],
)
def test_what_is_refused(text, message):
    with pytest.raises(BudgetError, match=message.replace(".", r"\.").replace("?", r"\?")) as error:
        Budget.parse(text)
    assert "\n" not in str(error.value)


def test_every_name_limits_a_resource_that_costs_have():
    for name in ("bits", "size", "params", "flops", "ms", "kv"):
        assert Cost().get(Limit(name, 2.0, "absolute").resource) == 0.0


def test_a_budget_passes_through():
    budget = Budget.parse("bits=4")
    assert Budget.parse(budget) is budget


@given(
    st.lists(st.sampled_from(["size", "params", "flops", "ms", "kv"]), unique=True, min_size=1),
    st.lists(st.integers(2, 10**6), min_size=5, max_size=5),
    st.lists(st.booleans(), min_size=5, max_size=5),
)
def test_its_text_reads_back_to_the_same_budget(names, values, relative):
    limits = tuple(
        Limit(name, v / 10**5 if r else float(v), "relative" if r else "absolute")
        for name, v, r in zip(names, values, relative, strict=False)
    )
    again = Budget.parse(str(Budget(limits)))
    for limit, read in zip(limits, again, strict=True):
        assert (read.name, read.unit) == (limit.name, limit.unit)
        assert read.value == pytest.approx(limit.value, rel=1e-5)
