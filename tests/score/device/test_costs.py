"""Operations and bytes, against those that a small model really does."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from layerwright.core.errors import InputError
from layerwright.score.device import LMShape, Stage, draw_counts, layer_costs, preset_shape
from layerwright.score.device.costs import block_work, expert_work, head_work, spread

H, F, HEADS, KV, DIM, EXPERTS, TOP, VOCAB = 64, 96, 4, 2, 16, 4, 2, 80
SHAPE = LMShape("tiny", 1, H, F, HEADS, KV, num_experts=EXPERTS, top_k=TOP, vocab_size=VOCAB)


class Attention(nn.Module):
    def forward(self, q, k, v):
        group = HEADS // KV
        scores = torch.stack([q[i] @ k[i // group].T for i in range(HEADS)])
        return torch.stack([torch.softmax(scores[i], -1) @ v[i // group] for i in range(HEADS)])


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(H, 2 * F, bias=False) for _ in range(EXPERTS))
        self.down = nn.ModuleList(nn.Linear(F, H, bias=False) for _ in range(EXPERTS))

    def forward(self, x, chosen):
        out = torch.zeros_like(x)
        for e in range(EXPERTS):
            rows = (chosen == e).any(-1).nonzero()[:, 0]
            if len(rows):
                gate, up = self.up[e](x[rows]).chunk(2, -1)
                out[rows] += self.down[e](nn.functional.silu(gate) * up)
        return out


class Tiny(nn.Module):
    """One decoder block with experts, and a head; one token of each of several requests with their own caches."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(H, (HEADS + 2 * KV) * DIM, bias=False)
        self.attention = Attention()
        self.projection = nn.Linear(HEADS * DIM, H, bias=False)
        self.gate = nn.Linear(H, EXPERTS, bias=False)
        self.experts = Experts()
        self.head = nn.Linear(H, VOCAB, bias=False)

    def forward(self, x, caches):
        qkv = self.qkv(x).reshape(len(x), -1, DIM)
        attended = []
        for row, (keys, values) in enumerate(caches):
            q, k, v = qkv[row, :HEADS, None], qkv[row, HEADS : HEADS + KV, None], qkv[row, HEADS + KV :, None]
            attended.append(self.attention(q, torch.cat([keys, k], 1), torch.cat([values, v], 1)).reshape(1, -1))
        x = x + self.projection(torch.cat(attended))
        chosen = self.gate(x).topk(TOP).indices
        return self.head(x + self.experts(x, chosen)), torch.bincount(chosen.flatten(), minlength=EXPERTS)


class Traffic(TorchDispatchMode):
    """Bytes in and out of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default):
            self.bytes += sum(t.numel() * t.element_size() for t in (*args, out) if isinstance(t, torch.Tensor))
        return out


@pytest.fixture(scope="module")
def counted():
    torch.manual_seed(0)
    model = Tiny().to(torch.bfloat16)
    contexts = (5, 17, 9, 30, 2)
    caches = [(torch.randn(KV, c - 1, DIM).bfloat16(), torch.randn(KV, c - 1, DIM).bfloat16()) for c in contexts]
    x = torch.randn(len(contexts), H).bfloat16()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        _, counts = model(x, caches)
    flops = {name.removeprefix("Tiny."): sum(found.values()) for name, found in counter.get_flop_counts().items()}
    traffic = {}
    for name in ("qkv", "projection", "gate", "head"):
        module = model.get_submodule(name)
        with torch.no_grad(), Traffic() as mode:
            module(torch.randn(len(contexts), module.in_features).bfloat16())
        traffic[name] = mode.bytes
    return layer_costs(SHAPE, Stage(contexts), counts.numpy()[None]), flops, traffic, contexts, counts


def test_matrix_products_are_those_of_a_real_model(counted) -> None:
    table, flops, traffic, _, _ = counted
    rows = {row.kind: row for row in table}
    for kind in ("qkv", "projection", "gate", "head"):
        assert rows[kind].flops == flops[kind], kind
        assert rows[kind].bytes == traffic[kind], kind
        assert rows[kind].op_per_byte == pytest.approx(flops[kind] / traffic[kind])


def test_attention_and_experts_are_those_of_a_real_model(counted) -> None:
    table, flops, _, contexts, counts = counted
    rows = {row.kind: row for row in table}
    # what is no matrix product comes on top: 5 operations for each score, and for each inner value of an expert
    assert rows["attention.decode"].flops - 5 * HEADS * sum(contexts) == flops["attention"]
    assert rows["experts"].flops - 5 * F * int(counts.sum()) == flops["experts"]
    read = 2 * 2 * KV * DIM * sum(contexts)
    assert rows["attention.decode"].bytes == read + 2 * 2 * HEADS * DIM * len(contexts)
    hit = int((counts > 0).sum())
    moved = 2 * (hit * 3 * H * F + int(counts.sum()) * (2 * H + 2 * F))
    assert rows["experts"].bytes == moved


def test_prefill_counts_every_pair_once() -> None:
    length = 12
    work = block_work(SHAPE, Stage(prefill=(length,)), moe=True)["attention.prefill"]
    q, k = torch.randn(HEADS, length, DIM), torch.randn(HEADS, DIM, length)
    with FlopCounterMode(display=False) as counter:
        scores = q @ k
        _ = scores @ q
    square = counter.get_total_flops()
    pairs = length * (length + 1) / 2
    assert work.flops - 5 * HEADS * pairs == pytest.approx(square * pairs / length**2)
    windowed = dataclasses.replace(SHAPE, window=4, windowed_layers=(0,))
    seen = sum(min(i + 1, 4) for i in range(length))
    found = block_work(windowed, Stage(prefill=(length,)), moe=True, windowed=True)["attention.prefill"]
    assert found.flops == seen * (4 * HEADS * DIM + 5 * HEADS)


def test_rules_of_thumb_for_operations_per_byte() -> None:
    shape = preset_shape("mixtral")
    rows = {
        r.kind: r.op_per_byte for r in layer_costs(shape, Stage((1000,) * 64)) if r.name.startswith(("layers.0", "h"))
    }
    assert rows["qkv"] == pytest.approx(64, rel=0.1)
    assert rows["experts"] == pytest.approx(64 * 2 / 8, rel=0.02)
    assert rows["attention.decode"] == pytest.approx(shape.group, rel=0.02)
    one = {row.kind: row.op_per_byte for row in layer_costs(shape, Stage((1000,)))}
    assert one["attention.decode"] == pytest.approx(rows["attention.decode"], rel=1e-6)
    prompt = {row.kind: row.op_per_byte for row in layer_costs(shape, Stage(prefill=(2048,)))}
    assert 0.3 * 2048 < prompt["attention.prefill"] < 2048


def test_layers_names_and_kinds() -> None:
    table = layer_costs(preset_shape("glam"), Stage((8, 8), (16,)))
    assert [name for name in table.names if name.startswith("layers.0.")] == [
        f"layers.0.{kind}" for kind in ("qkv", "attention.prefill", "attention.decode", "projection", "ffn")
    ]
    assert "layers.1.experts" in table.names and "layers.1.ffn" not in table.names
    assert table.names[-1] == "head" and len(table) == len(list(table)) == 32 * 5 + 16 + 1


def test_shards_share_the_matrices() -> None:
    shape, stage = preset_shape("mixtral"), Stage((512,) * 16)
    whole, part = (layer_costs(shape, stage, shards=n) for n in (1, 4))
    split = np.array([kind != "gate" for kind in whole.kinds])
    np.testing.assert_allclose(part.flops[split] * 4, whole.flops[split])
    np.testing.assert_array_equal(part.flops[~split], whole.flops[~split])
    assert (part.bytes * 4 >= whole.bytes * (1 - 1e-12)).all()
    # key and value heads cannot be split into parts: the cache of 8 heads on 16 devices is there twice
    assert (
        block_work(shape, stage, moe=True, shards=16)["attention.decode"].bytes
        > block_work(shape, stage, moe=True, shards=8)["attention.decode"].bytes / 2
    )


def test_experts_without_tokens_cost_nothing() -> None:
    work = expert_work(SHAPE, [[0, 3], [1, 0]])
    assert (work.flops[0, 0], work.bytes[0, 0], work.bytes[1, 1]) == (0, 0, 0)
    assert work.bytes[0, 1] > work.bytes[1, 0] > 0


def test_counts_sum_to_tokens_times_k() -> None:
    shape = preset_shape("glam")
    assert (spread(7, shape).sum(1) == 14).all() and spread(7, shape).shape == (16, 64)
    counts = draw_counts(shape, 7, np.random.default_rng(0))
    layer_costs(shape, Stage((1,) * 7), counts)
    with pytest.raises(InputError, match="each row must sum to 8 tokens times top_k 2"):
        layer_costs(shape, Stage((1,) * 8), counts)
    with pytest.raises(InputError, match=r"got shape \(15, 64\)"):
        layer_costs(shape, Stage((1,) * 7), counts[1:])


def test_stages() -> None:
    assert [Stage((1,)).kind, Stage((1,), (2,)).kind, Stage((), (2,)).kind, Stage().kind] == [
        "decode",
        "mixed",
        "prefill",
        "idle",
    ]
    assert Stage((5, 6), (7, 8)).tokens == 17
    assert len(layer_costs(SHAPE, Stage())) == 0
    assert head_work(SHAPE, Stage((5, 6), (7,))).flops == 2 * 3 * H * VOCAB
    with pytest.raises(InputError, match="prefill: got 0"):
        Stage(prefill=(0,))
