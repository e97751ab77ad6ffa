"""Retrieval by product keys: exact, and what its settings do."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwright.core.errors import InputError
from layerwright.nn import _largest
from layerwright.nn._largest import largest
from layerwright.nn.product_keys import ProductKeyRouter, QueryBatchNorm, product_top_k
from oracles.peer import best_of_all


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 9), top=st.integers(1, 81), seed=st.integers(0, 10_000), ties=st.booleans())
def test_the_largest_sums_are_those_of_all_pairs(n: int, top: int, seed: int, ties: bool) -> None:
    top = min(top, n * n)
    first, second = draw(3, 2, n, seed=seed), draw(3, 2, n, seed=seed + 1)
    if ties:
        first, second = first.round(), second.round()
    values, indices = product_top_k(first, second, top)
    every = (first[..., :, None] + second[..., None, :]).flatten(-2)
    assert torch.equal(values, every.topk(top).values)
    assert torch.equal(every.gather(-1, indices), values)
    assert all(len(set(row)) == top for row in indices.flatten(0, -2).tolist())


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("top", [1, 5, 36])
def test_the_router_finds_the_best_of_all_keys(shared: bool, top: int) -> None:
    router = ProductKeyRouter(8, 36, 3, top, 6, share_keys=shared, generator=torch.Generator().manual_seed(1)).eval()
    x = draw(5, 8)
    gates, indices = router(x)
    queries = router.queries(x)
    for t in range(5):
        for head in range(3):
            keys = router.keys if shared else router.keys[:, head]
            scores, order = best_of_all(queries[t, head], keys.detach(), top)
            assert indices[t, head].tolist() == order
            assert torch.allclose(gates[t, head].double(), torch.tensor(scores).softmax(0).double(), atol=1e-6)


@pytest.mark.parametrize(("n", "count"), [(48, 16), (64, 63), (256, 16), (1024, 16), (1024, 32), (4096, 3), (1032, 5)])
def test_partition_finds_what_topk_does(n: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_largest, "MOST_THREADS", 1 << 20)
    rows = draw(200, n)
    assert _largest._suits(rows, count)
    for a, b in zip(largest(rows, count), rows.topk(count), strict=True):
        assert torch.equal(a, b)
    tied = rows.round(decimals=1)
    values, places = largest(tied, count)
    assert torch.equal(values, tied.topk(count).values)
    assert torch.equal(tied.gather(1, places), values)
    strange = tied.clone()
    strange[3, 7], strange[5, 2], strange[6] = float("nan"), float("inf"), float("-inf")
    assert torch.equal(largest(strange, count)[0].nan_to_num(99), strange.topk(count).values.nan_to_num(99))


def test_ties_and_nan_that_make_up_for_each_other_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_largest, "MOST_THREADS", 1 << 20)
    rows = draw(2, 64)
    rows[0].clamp_(max=float(rows[0].topk(4).values[-1]))  # four tie for the largest
    rows[1, 9] = float("nan")
    values, _ = largest(rows, 3)
    assert torch.equal(values.nan_to_num(99), rows.topk(3).values.nan_to_num(99))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("gate", ["softmax", "sigmoid", "relu"])
def test_gradients_are_those_of_the_whole_score_matrix(shared: bool, gate: str) -> None:
    router = ProductKeyRouter(
        6, 25, 2, 4, 8, "batch", shared, gate, generator=torch.Generator().manual_seed(2)
    ).double()
    x = draw(7, 6).double().requires_grad_()
    weights = draw(7, 2, 4, seed=5).double()
    gates, indices = router(x)
    (gates * weights).sum().backward()
    found = [x.grad.clone(), router.query.grad.clone(), router.keys.grad.clone()]
    for tensor in (x, router.query, router.keys):
        tensor.grad = None
    queries = router.queries(x)
    keys = router.keys if shared else router.keys.transpose(0, 1)
    form = "thc,nc->thn" if shared else "thc,hnc->thn"
    halves = [torch.einsum(form, queries[:, :, i], router.keys[i]) for i in (0, 1)]
    every = (halves[0][..., :, None] + halves[1][..., None, :]).flatten(-2)
    assert torch.equal(every.topk(4).indices, indices)
    (router._weigh(every.topk(4).values) * weights).sum().backward()
    assert keys.numel() == router.keys.numel()
    for a, tensor in zip(found, (x, router.query, router.keys), strict=True):
        assert torch.allclose(a, tensor.grad, atol=1e-10)


def test_batch_norm_is_that_of_torch() -> None:
    ours, theirs = QueryBatchNorm(5), torch.nn.BatchNorm1d(5)
    for step in range(3):
        x = draw(9, 5, seed=step) * 3 + 1
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, z = ours(a), theirs(b)
        assert torch.allclose(y, z, atol=1e-5)
        (y * draw(9, 5, seed=9)).sum().backward()
        (z * draw(9, 5, seed=9)).sum().backward()
        assert torch.allclose(a.grad, b.grad, atol=1e-5)
    assert torch.allclose(ours.running_mean, theirs.running_mean, atol=1e-6)
    assert torch.allclose(ours.running_var, theirs.running_var, atol=1e-5)
    assert torch.allclose(ours.eval()(x), theirs.eval()(x), atol=1e-5)


def test_padding_leaves_statistics_and_results_alone() -> None:
    def router() -> ProductKeyRouter:
        return ProductKeyRouter(6, 25, 2, 3, 8, generator=torch.Generator().manual_seed(2))

    x, mask = draw(2, 5, 6), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    other = torch.where(mask.bool()[..., None], x, 100 * draw(2, 5, 6, seed=7))
    first, second, third = router(), router(), router()
    a, b = first(x, mask)[0], second(other, mask)[0]
    assert torch.equal(a[mask.bool()], b[mask.bool()])
    assert torch.equal(first.norm.running_mean, second.norm.running_mean)
    third(x)
    assert not torch.allclose(first.norm.running_mean, third.norm.running_mean)
    alone = router()
    assert torch.allclose(alone(x[mask.bool()])[0], a[mask.bool()], atol=1e-6)
    assert torch.allclose(alone.norm.running_var, first.norm.running_var, atol=1e-6)


def test_running_statistics_stay_in_float32() -> None:
    router = ProductKeyRouter(6, 25, 2, 3, 8, generator=torch.Generator().manual_seed(2))
    router(draw(9, 6) + 0.123)
    before = router.norm.running_mean.clone()
    router.to(torch.bfloat16)
    assert router.query.dtype == torch.bfloat16
    assert torch.equal(router.norm.running_mean, before)
    gates, _ = router(draw(9, 6).bfloat16())
    assert gates.dtype == torch.float32
    assert router.to(torch.float64).norm.running_mean.dtype == torch.float64


@pytest.mark.parametrize("norm", ["batch", "layer", "none"])
def test_norms(norm: str) -> None:
    router = ProductKeyRouter(6, 25, 2, 3, 8, norm, generator=torch.Generator().manual_seed(2))
    queries = router.queries(draw(400, 6))
    if norm == "batch":
        assert torch.allclose(queries.mean(0), torch.zeros(2, 2, 4), atol=1e-5)
        assert torch.allclose(queries.var(0), torch.ones(2, 2, 4), atol=1e-2)
    if norm == "layer":
        assert torch.allclose(queries.flatten(2).mean(-1), torch.zeros(400, 2), atol=1e-5)
    assert {name for name, _ in router.named_buffers()} == (
        {"norm.running_mean", "norm.running_var"} if norm == "batch" else set()
    )


def test_first_scores_have_unit_deviation() -> None:
    router = ProductKeyRouter(64, 64**2, 4, 8, 128, generator=torch.Generator().manual_seed(0))
    queries = router.queries(draw(500, 64))
    scores = (queries[:, :, 0] @ router.keys[0].t()).detach()
    assert float(scores.std()) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_experts": 10}, "num_experts: got 10, expected a square such as 9 or 16"),
        ({"num_experts": 0}, "num_experts: got 0"),
        ({"num_experts": -4}, "num_experts: got -4"),
        ({"top_k": 17}, "top_k: got 17, expected 1 to 16"),
        ({"top_k": 0}, "top_k: got 0"),
        ({"heads": 0}, "heads: got 8 and 0"),
        ({"query_dim": 7}, "query_dim: got 7, expected an even number"),
        ({"query_dim": 0}, "query_dim: got 0"),
        ({"query_norm": "batsh"}, "did you mean batch"),
        ({"gate": "hard"}, "unknown gate 'hard'"),
    ],
)
def test_wrong_settings(settings: dict, message: str) -> None:
    given = {"dim": 8, "num_experts": 16, "heads": 2, "top_k": 2, "query_dim": 8} | settings
    with pytest.raises(InputError, match=message):
        ProductKeyRouter(**given)


def test_wrong_inputs() -> None:
    router = ProductKeyRouter(8, 16, 2, 2, 8)
    with pytest.raises(InputError, match=r"x: got shape \(3, 7\), expected \(..., 8\)"):
        router(torch.zeros(3, 7))
    with pytest.raises(InputError, match="got 1 tokens in training, expected at least 2"):
        router(torch.zeros(1, 8))
    with pytest.raises(InputError, match="got 1 tokens in training"):
        router(torch.zeros(3, 8), torch.tensor([1, 0, 0]))
    with pytest.raises(InputError, match=r"mask: got shape \(2,\), expected \(3,\)"):
        router(torch.zeros(3, 8), torch.ones(2))
    with pytest.raises(TypeError, match="int64, expected a floating-point tensor"):
        router(torch.zeros(3, 8, dtype=torch.int64))
    router.eval()(torch.zeros(1, 8))
    gates, indices = router.train()(torch.zeros(0, 4, 8))
    assert gates.shape == indices.shape == (0, 4, 2, 2)
    assert indices.dtype == torch.int64


def test_scores_stay_in_float32_under_autocast() -> None:
    router = ProductKeyRouter(8, 36, 3, 5, 6, query_norm="layer", generator=torch.Generator().manual_seed(1)).eval()
    queries = draw(5, 3, 2, 3)
    with torch.no_grad():
        wanted = router.retrieve(queries)
        with torch.autocast("cpu", torch.bfloat16):
            found = router.retrieve(queries)
            gates, _ = router(draw(5, 8))
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])
    assert gates.dtype == torch.float32
