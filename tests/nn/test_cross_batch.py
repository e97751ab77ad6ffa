"""Attention to other rows' windows: against ordinary attention, gradients, who sees whom, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from layerwright.core.errors import InputError
from layerwright.nn._llama_attention import grouped, turn
from layerwright.nn.cross_batch import context_rows, cross_batch_attention, packed_contexts

HEADS, KV, TOKENS, WIDTH = 4, 2, 5, 6


def drawn(rows: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    heads = (HEADS, KV, KV)
    return [torch.randn(rows, h, TOKENS, WIDTH, generator=made).to(dtype) for h in heads]


def tables(tokens: int = TOKENS) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.arange(tokens, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.3, 0.05] * 2).double()
    return angles.cos()[None], angles.sin()[None]


def ordinary(q: Any, k: Any, v: Any, before: list[tuple[Any, Any]], rope: Any) -> torch.Tensor:
    """One row: all windows before it with keys at position 0, then its own, causal."""
    turned, local = (q, k) if rope is None else (turn(q, *rope), turn(k, *rope))
    keys = grouped(torch.cat([*(a for a, _ in before), local], 2), HEADS)
    values = grouped(torch.cat([*(b for _, b in before), v], 2), HEADS)
    mask = torch.ones(TOKENS, keys.shape[2], dtype=torch.bool).tril(keys.shape[2] - TOKENS)
    return F.scaled_dot_product_attention(turned, keys, values, attn_mask=mask)


@pytest.mark.parametrize("rope", [None, tables()])
@pytest.mark.parametrize("contexts", [1, 2, 3])
def test_previous_windows_are_ordinary_attention(contexts: int, rope: Any) -> None:
    q, k, v = drawn(6)
    out = cross_batch_attention(q, k, v, contexts, rope=rope)
    for row in range(3):
        own, now = slice(row, row + 1), slice(3 + row, 4 + row)
        assert torch.allclose(out[own], ordinary(q[own], k[own], v[own], [], rope))
        others = [(row + j) % 3 for j in range(contexts)]
        before = [(k[j : j + 1], v[j : j + 1]) for j in others]
        assert torch.allclose(out[now], ordinary(q[now], k[now], v[now], before, rope))


@pytest.mark.parametrize("rope", [None, tables()])
def test_packed_rows_are_ordinary_attention(rope: Any) -> None:
    q, k, v = drawn(4)
    counts = torch.tensor([1, 2, 1, 3])
    out = cross_batch_attention(q, k, v, 3, "packed", counts, rope)
    for row, count in enumerate(counts.tolist()):
        now = slice(row, row + 1)
        before = [(k[j : j + 1], v[j : j + 1]) for j in range(row - 1, row - count, -1)]
        assert torch.allclose(out[now], ordinary(q[now], k[now], v[now], before, rope))


def test_gradients_reach_positives_and_negatives_and_no_others() -> None:
    q, k, v = (x.requires_grad_() for x in drawn(8))
    out = cross_batch_attention(q, k, v, 2)
    for row in range(4):
        grads = torch.autograd.grad(out[4 + row].square().sum(), (k, v), retain_graph=True)
        for grad in grads:
            reached = {j for j in range(4) if bool(grad[j].any())}
            assert reached == {row, (row + 1) % 4}
            assert {j for j in range(4, 8) if bool(grad[j].any())} == {4 + row}


def test_packed_rows_see_no_later_row() -> None:
    q, k, v = drawn(5)
    before = cross_batch_attention(q, k, v, 4, "packed")
    for row in range(1, 5):
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[row] += 1
        after = cross_batch_attention(*changed, 4, "packed")
        assert torch.equal(after[:row], before[:row])
        assert not torch.allclose(after[row:], before[row:])


@pytest.mark.parametrize("layout", ["previous", "packed"])
def test_gradcheck(layout: Any) -> None:
    made = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(4, 2, 3, 2, generator=made).double().requires_grad_() for _ in range(3))
    scale = torch.rand(2, generator=made).double().add(0.5).requires_grad_()
    assert torch.autograd.gradcheck(lambda *x: cross_batch_attention(*x[:3], 2, layout, scale=x[3]), (q, k, v, scale))


def test_windows_of_packed_rows() -> None:
    assert packed_contexts(4, 4, 0).tolist() == [1, 1, 1, 1]
    assert packed_contexts(8, 4, 3).tolist() == [1, 2, 3, 4, 1, 3, 4, 4]  # step 2; the first rows have few before them
    assert packed_contexts(6, 2, 2).tolist() == [1, 2, 1, 3, 1, 3]  # the second row has but two windows up to it
    assert packed_contexts(3, 1, 5).tolist() == [1, 1, 1]
    seen, valid = context_rows(3, 2, "packed")
    assert seen[valid].tolist() == [0, 1]


def test_half_precision() -> None:
    q, k, v = drawn(6, dtype=torch.float32)
    low = cross_batch_attention(*(x.bfloat16() for x in (q, k, v)), 2)
    assert low.dtype == torch.bfloat16
    assert torch.allclose(low.float(), cross_batch_attention(q, k, v, 2), atol=0.05)


def test_wrong_inputs() -> None:
    q, k, v = drawn(6)
    for contexts, message in ((4, "num_contexts: got 4 for a batch of 3"), (0, "num_contexts: got 0")):
        with pytest.raises(InputError, match=message):
            cross_batch_attention(q, k, v, contexts)
    with pytest.raises(InputError, match="rows: got 5"):
        cross_batch_attention(q[:5], k[:5], v[:5], 1)
    with pytest.raises(InputError, match="longer than the window of 3"):
        cross_batch_attention(q, k, v, 1, rope=tables(3))
    with pytest.raises(InputError, match="unknown layout"):
        cross_batch_attention(q, k, v, 1, "other")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="k, v: got"):
        cross_batch_attention(q, k[:, :, :3], v, 1)
    with pytest.raises(InputError, match="contexts_per_row"):
        cross_batch_attention(q, k, v, 2, "packed", torch.tensor([1, 2, 3, 1, 1, 1]))
    with pytest.raises(InputError, match="num_contexts: got 9 for a batch of 6 rows"):
        cross_batch_attention(q, k, v, 9, "packed")
    with pytest.raises(InputError, match="pack: got 4 for 6 rows"):
        packed_contexts(6, 4, 1)
    with pytest.raises(InputError, match="extra: got -1"):
        packed_contexts(6, 2, -1)
