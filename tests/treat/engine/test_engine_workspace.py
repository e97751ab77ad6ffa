from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwright.treat.engine import BufferPool, Interval, StaticKVCache, Workspace, fold_norm_

ALIGN = 64


@st.composite
def traces(draw: st.DrawFn, most: int) -> list[Interval]:
    found = []
    for number in range(draw(st.integers(1, most))):
        first = draw(st.integers(0, 8))
        found.append(Interval(str(number), draw(st.integers(1, 10)) * ALIGN, first, first + draw(st.integers(0, 5))))
    return found


def overlaps(trace: list[Interval], offsets: dict[str, int]) -> bool:
    """Whether two tensors that are needed at one operation share a byte: by looking at each pair."""
    return any(
        a.first <= b.last
        and b.first <= a.last
        and offsets[a.name] < offsets[b.name] + b.size
        and offsets[b.name] < offsets[a.name] + a.size
        for a, b in itertools.combinations(trace, 2)
    )


def best(trace: list[Interval]) -> int:
    """The smallest buffer over all orders of placing each tensor at the lowest free offset, which is optimal."""
    smallest = sum(interval.size for interval in trace)
    for order in itertools.permutations(trace):
        placed: list[tuple[Interval, int]] = []
        for interval in order:
            rivals = sorted((o, o + other.size) for other, o in placed if other.meets(interval))
            start = 0
            for low, high in rivals:
                if start + interval.size <= low:
                    break
                start = max(start, high)
            placed.append((interval, start))
        smallest = min(smallest, max(o + i.size for i, o in placed))
    return smallest


@given(traces(24))
@settings(max_examples=200, deadline=None)
def test_nothing_that_lives_together_overlaps(trace: list[Interval]) -> None:
    plan = Workspace.plan(trace)
    assert not overlaps(trace, dict(plan.offsets))
    assert all(plan.offsets[i.name] >= 0 and plan.offsets[i.name] + i.size <= plan.size for i in trace)
    last = max(i.last for i in trace)
    floor = max(sum(i.size for i in trace if i.first <= t <= i.last) for t in range(last + 1))
    assert floor <= plan.size <= plan.separate == sum(i.size for i in trace)


@given(traces(6))
@settings(max_examples=40, deadline=None)
def test_plans_are_near_the_best(trace: list[Interval]) -> None:
    assert Workspace.plan(trace).size <= 1.5 * best(trace)


@given(traces(12))
@settings(max_examples=50, deadline=None)
def test_a_pool_serves_the_trace_and_lends_nothing_twice(trace: list[Interval]) -> None:
    floor = max(sum(i.size for i in trace if i.first <= t <= i.last) for t in range(14))
    assert floor <= BufferPool.size_for(trace) <= sum(i.size for i in trace)


def test_a_pool_reuses_the_first_that_fits() -> None:
    pool = BufferPool()
    large, small = pool.get(100), pool.get(10)
    pool.release(large)
    assert pool.get(20) is large
    assert pool.get(5) is not small
    assert pool.nbytes == 115
    with pytest.raises(ValueError, match="not lent"):
        pool.release(torch.zeros(3, dtype=torch.uint8))
    pool.release(small)
    with pytest.raises(ValueError, match="given back twice"):
        pool.release(small)


def test_tensors_of_a_workspace_are_views_of_one_buffer() -> None:
    space = Workspace(Workspace.plan([Interval("a", 64, 0, 1), Interval("b", 100, 1, 2), Interval("c", 64, 2, 3)]))
    a, b = space.tensor("a", (4, 4), torch.float32), space.tensor("b", (50,), torch.bfloat16)
    a.fill_(1)
    b.fill_(2)
    assert float(a.sum()) == 16 and float(b.float().sum()) == 100
    assert space.nbytes == 192
    assert space.tensor("c", (16,), torch.float32).data_ptr() == a.data_ptr()
    with pytest.raises(ValueError, match="no tensor 'd'"):
        space.tensor("d", (1,), torch.float32)
    with pytest.raises(ValueError, match="names of tensors must differ"):
        Workspace.plan([Interval("a", 1, 0, 0), Interval("a", 1, 0, 0)])
    with pytest.raises(ValueError, match="0 <= first <= last"):
        Interval("a", 1, 2, 1)


def filled(rows: int = 4, length: int = 6) -> StaticKVCache:
    cache = StaticKVCache(2, rows, 3, 8, 4)
    generator = torch.Generator().manual_seed(0)
    for layer in range(2):
        cache.write(layer, 0, 0, *torch.randn(2, rows, 3, length, 4, generator=generator))
    cache.length = length
    cache.start = torch.arange(rows)
    return cache


@given(st.lists(st.integers(0, 3), min_size=1, max_size=4), st.integers(0, 6))
@settings(max_examples=60, deadline=None)
def test_reordering_equals_copying(index: list[int], since: int) -> None:
    cache, before = filled(), filled()
    for layer in before.layers:
        layer[:, :, :, :since] = layer[:, :1, :, :since]  # what is shared is equal
    for layer, other in zip(cache.layers, before.layers, strict=True):
        layer.copy_(other)
    chosen = torch.tensor(index)
    cache.reorder(chosen, since)
    for layer in range(2):
        rows = len(index)
        assert torch.equal(cache.keys(layer, rows), before.keys(layer, 4)[chosen])
        assert torch.equal(cache.values(layer, rows), before.values(layer, 4)[chosen])
        assert torch.equal(cache.layers[layer][:, rows:], before.layers[layer][:, rows:])
    assert torch.equal(cache.start[: len(index)], before.start[chosen])


def test_a_cache_counts_its_room() -> None:
    cache = filled()
    assert cache.nbytes == 2 * 2 * 4 * 3 * 8 * 4 * 4
    cache.need(2)
    with pytest.raises(ValueError, match="6 tokens and 3 more exceed max_length 8"):
        cache.need(3)
    cache.truncate(2)
    assert cache.length == 2 and cache.keys(0, 4).shape == (4, 3, 2, 4)
    with pytest.raises(ValueError, match="length: got 3, expected 0 to 2"):
        cache.truncate(3)
    row = cache.layers[1][:, 3, :, :5].clone()
    cache.move_row(3, 0, 5)
    assert torch.equal(cache.layers[1][:, 0, :, :5], row)
    cache.clear()
    assert cache.length == 0 and not cache.start.any()
    with pytest.raises(ValueError, match="batch: got 0"):
        StaticKVCache(1, 0, 1, 1, 1)


@pytest.mark.parametrize("keys", [1, 3, 17, 64, 257])
def test_softmax_may_replace_its_input(keys: int) -> None:
    scores = torch.randn(6, 3, keys, generator=torch.Generator().manual_seed(keys)) * 5
    expected = torch.softmax(scores, -1)
    torch.softmax(scores, -1, out=scores)
    assert torch.equal(scores, expected)


def test_folding_a_norm_changes_nothing() -> None:
    norm = torch.nn.RMSNorm(16)
    first, second = torch.nn.Linear(16, 8), torch.nn.Linear(16, 4)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(16, generator=torch.Generator().manual_seed(0)))
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    expected = first(norm(x)), second(norm(x))
    fold_norm_(norm, (first, second))
    assert bool((norm.weight == 1).all())
    torch.testing.assert_close((first(norm(x)), second(norm(x))), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="a gain of 16 for layers of"):
        fold_norm_(norm, (torch.nn.Linear(8, 8),))
