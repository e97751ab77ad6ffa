"""The store of keys and values, and the attention that sees it: exact search, chunks, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from layerwright.core.errors import InputError
from layerwright.nn.memory_attention import KVMemory, MemoryAttention

HEADS, KV, WIDTH = 4, 2, 6


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(positions: int = 7, **settings: Any) -> KVMemory:
    memory = KVMemory(KV, WIDTH, torch.float32, **settings)
    memory.append(drawn(2, KV, positions, WIDTH), drawn(2, KV, positions, WIDTH, seed=1))
    return memory


def layer(**settings: Any) -> MemoryAttention:
    return MemoryAttention(HEADS, KV, WIDTH, dtype=torch.float32, **settings)


def test_positions_are_appended_and_the_oldest_leave() -> None:
    memory = filled(3, capacity=5)
    k, v = drawn(2, KV, 4, WIDTH, seed=2), drawn(2, KV, 4, WIDTH, seed=3)
    memory.append(k.requires_grad_(), v, torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]))
    assert len(memory) == 5
    assert memory.keys is not None
    assert memory.mask is not None
    assert not memory.keys.requires_grad
    assert torch.equal(memory.keys[:, :, 1:], k)
    assert torch.equal(memory.keys[:, :, :1], drawn(2, KV, 3, WIDTH)[:, :, 2:])
    assert memory.mask.tolist() == [[True] * 4 + [False], [True] * 5]
    memory.append(drawn(2, KV, 9, WIDTH), drawn(2, KV, 9, WIDTH))
    assert len(memory) == 5
    assert torch.equal(memory.keys, drawn(2, KV, 9, WIDTH)[:, :, 4:])


def test_search_is_the_sorted_list_of_all_products() -> None:
    memory, q = filled(), drawn(2, HEADS, 3, WIDTH, seed=5)
    assert memory.mask is not None
    memory.mask[0, 2] = False
    scores, keys, values = memory.search(q, 3)
    assert scores.shape == (2, HEADS, 3, 3)
    assert keys.shape == values.shape == (2, HEADS, 3, 3, WIDTH)
    for b in range(2):
        for h in range(HEADS):
            for t in range(3):
                seen = [s for s in range(7) if (b, s) != (0, 2)]
                products = {s: float(q[b, h, t] @ memory.keys[b, h // 2, s]) for s in seen}
                best = sorted(products, key=products.__getitem__, reverse=True)[:3]
                assert torch.allclose(scores[b, h, t], torch.tensor([products[s] for s in best]), atol=1e-5)
                assert torch.equal(values[b, h, t], memory.values[b, h // 2, best])
                assert torch.equal(keys[b, h, t], memory.keys[b, h // 2, best])
    assert memory.search(q, 99)[0].shape[-1] == 7


def test_rows_are_forgotten() -> None:
    memory, q = filled(), drawn(2, HEADS, 3, WIDTH)
    memory.reset([1])
    assert bool(torch.isinf(memory.scores(q)[1]).all())
    assert bool(torch.isfinite(memory.scores(q)[0]).all())
    for rows in ([2], [-1], [0, 5]):
        with pytest.raises(InputError, match="rows: got"):
            memory.reset(rows)
    memory.reset()
    assert len(memory) == 0
    with pytest.raises(InputError, match="the memory is empty"):
        memory.reset([0])
    with pytest.raises(InputError, match="the memory is empty"):
        memory.search(q, 1)


def oracle(q: Any, k: Any, v: Any, store: KVMemory | None) -> torch.Tensor:
    """Local causal keys and the memory's, query by query, in float64."""
    out = torch.zeros_like(q, dtype=torch.float64)
    for b in range(q.shape[0]):
        for h in range(HEADS):
            for t in range(q.shape[2]):
                keys, values = k[b, h // 2, : t + 1], v[b, h // 2, : t + 1]
                if store is not None:
                    held = store.mask[b]
                    keys = torch.cat([keys, store.keys[b, h // 2][held]])
                    values = torch.cat([values, store.values[b, h // 2][held]])
                out[b, h, t] = (keys.double() @ q[b, h, t].double()).softmax(0) @ values.double()
    return out


@pytest.mark.parametrize("chunk", [(8, 256), (2, 2), (1, 1), (3, 4)])
@pytest.mark.parametrize("top_k", [None, 7, 50])
@pytest.mark.parametrize("empty", [False, True])
def test_one_softmax_over_local_and_memory_keys_in_chunks_or_not(chunk: Any, top_k: Any, empty: bool) -> None:
    memory = layer(chunk=chunk, top_k=top_k)
    memory.store = None if empty else filled()
    if memory.store is not None:
        memory.store.mask[1, :3] = False
    q, k, v = drawn(2, HEADS, 5, WIDTH, seed=6), drawn(2, KV, 5, WIDTH, seed=7), drawn(2, KV, 5, WIDTH, seed=8)
    assert torch.allclose(memory._attend(q, k, v, None).double(), oracle(q, k, v, memory.store), atol=1e-5)


def test_the_best_keys_are_those_of_the_whole_memory_and_no_others() -> None:
    memory, exact = layer(top_k=2), layer()
    memory.store = exact.store = filled(9)
    q, k, v = drawn(2, HEADS, 5, WIDTH, seed=6) * 40, drawn(2, KV, 5, WIDTH, seed=7), drawn(2, KV, 5, WIDTH, seed=8)
    assert torch.allclose(memory._attend(q, k, v, None), exact._attend(q, k, v, None), atol=1e-3)  # sharp: two suffice
    soft = memory._attend(q / 400, k, v, None), exact._attend(q / 400, k, v, None)
    assert not torch.allclose(*soft, atol=1e-3)


def test_half_precision_store() -> None:
    memory = KVMemory(KV, WIDTH)
    memory.append(drawn(1, KV, 4, WIDTH), drawn(1, KV, 4, WIDTH))
    assert memory.keys is not None
    assert memory.keys.dtype == torch.bfloat16
    assert memory.scores(drawn(1, HEADS, 2, WIDTH)).dtype == torch.float32


def test_spec_there_and_back() -> None:
    for settings in ({}, {"position": "none", "top_k": 3, "temperature": "learned", "chunk": (2, 5), "capacity": 9}):
        memory = layer(**settings)
        again = MemoryAttention.empty(memory.spec())
        assert again.spec() == memory.spec()
        assert set(again.state_dict()) == set(memory.state_dict())
    assert MemoryAttention.empty(MemoryAttention(4, 2, 6, dtype=None).spec()).dtype is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"position": "last"}, "unknown position"),
        ({"temperature": "hot"}, "unknown temperature"),
        ({"top_k": 0}, "top_k: got 0"),
        ({"chunk": (0, 5)}, "chunk: got 0"),
        ({"capacity": 0}, "capacity: got 0"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        layer(**settings)
    with pytest.raises(InputError, match="kv_heads: got 3"):
        MemoryAttention(4, 3, 6)


def test_wrong_memories() -> None:
    memory = filled()
    other = drawn(2, KV, 3, WIDTH)
    for k, message in (
        (drawn(2, KV + 1, 3, WIDTH), "expected 2 heads of 6"),
        (drawn(2, KV, 3, WIDTH + 1), "expected 2 heads of 6"),
        (drawn(3, KV, 3, WIDTH), "got 3 rows, the memory holds 2"),
    ):
        with pytest.raises(InputError, match=message):
            memory.append(k, k)
    with pytest.raises(InputError, match="k, v: got"):
        memory.append(other, other[:, :, :2])
    with pytest.raises(InputError, match="one floating dtype"):
        memory.append(other.long(), other.long())
    with pytest.raises(InputError, match="one floating dtype"):
        memory.append(other, other.double())
    with pytest.raises(InputError, match="mask: got"):
        memory.append(other, other, torch.ones(2, 4))
    with pytest.raises(InputError, match="q: got"):
        memory.scores(drawn(1, HEADS, 3, WIDTH))
    with pytest.raises(InputError, match="top_k: got 0"):
        memory.search(drawn(2, HEADS, 3, WIDTH), 0)
    with pytest.raises(InputError, match="num_heads: got 0"):
        KVMemory(0, 4)
    with pytest.raises(InputError, match=r"dtype: got torch\.int8"):
        KVMemory(1, 4, torch.int8)
