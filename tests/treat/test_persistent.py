"""Llamas whose feed-forward parts became persistent vectors: what they compute, with caches and padding, and on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import layerwright as lw
from layerwright.core.errors import InputError
from layerwright.treat.persistent import find_persistent, persistent_mass, swap_ffn_for_persistent
from zoo import ZOO

IDS = torch.randint(1, 90, (2, 9), generator=torch.Generator().manual_seed(0))


def llama() -> Any:
    return ZOO["llama"]()[0].eval()


def test_a_block_is_attention_over_both_by_the_loop() -> None:
    model = llama()
    swapped, paths = swap_ffn_for_persistent(model, [1], 3, seed=2)
    assert paths == ("model.layers.1",)
    block: Any = swapped.get_submodule(paths[0])
    hidden = torch.randn(1, 5, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    cos, sin = model.model.rotary_emb(hidden, torch.arange(5)[None])
    attention, width = block.self_attn, block.self_attn.head_dim
    heads = model.config.num_attention_heads
    group = heads // model.config.num_key_value_heads
    x = block.input_layernorm(hidden)[0].double()

    def turned(vector: Tensor, place: int) -> Tensor:
        half = torch.cat([-vector[width // 2 :], vector[: width // 2]])
        return vector * cos[0, place].double() + half * sin[0, place].double()

    weights = {name: getattr(attention, name).weight.double() for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    keys, values = (t.double() for t in block.persistent.memory())
    out = torch.zeros(5, heads * width, dtype=torch.float64)
    mass = torch.zeros(heads, dtype=torch.float64)
    for head in range(heads):
        rows = slice(head * width, (head + 1) * width)
        shared = slice(head // group * width, (head // group + 1) * width)
        for t in range(5):
            query = weights["q_proj"][rows] @ x[t]
            scores = [turned(query, t) @ turned(weights["k_proj"][shared] @ x[s], s) for s in range(t + 1)]
            scores += [query @ key for key in keys[head // group]]
            share = (torch.stack(scores) / width**0.5).softmax(0)
            seen = [weights["v_proj"][shared] @ x[s] for s in range(t + 1)] + list(values[head // group])
            out[t, rows] = share @ torch.stack(seen)
            mass[head] += share[t + 1 :].sum() / 5
    expected = hidden[0].double() + out @ weights["o_proj"].T
    got = block(hidden, position_embeddings=(cos, sin))
    assert torch.allclose(got[0].double(), expected, atol=1e-5)
    found = block.persistent.weights(attention, block.input_layernorm(hidden), (cos, sin)).mean((0, 2))
    assert torch.allclose(found.double(), mass, atol=1e-5)


def test_the_original_stays_and_the_numbers_are_counted() -> None:
    model = llama()
    before = model(IDS).logits
    swapped, paths = swap_ffn_for_persistent(model, "all", 5)
    assert torch.equal(model(IDS).logits, before)
    assert not find_persistent(model)
    assert (
        tuple(find_persistent(swapped)) == paths == tuple(f"model.layers.{i}" for i in range(len(model.model.layers)))
    )
    assert not any("mlp" in name or "post_attention" in name for name in swapped.state_dict())
    config = model.config
    mlp = 3 * config.hidden_size * config.intermediate_size + config.hidden_size
    own = 2 * 5 * config.num_key_value_heads * config.head_dim
    count = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in swapped.parameters())
    assert count == len(paths) * (mlp - own)
    kept = dict(swapped.named_parameters())
    assert all(kept[name] is p for name, p in model.named_parameters() if name in kept)


def test_a_cache_and_padding_give_what_a_full_pass_gives() -> None:
    swapped, _ = swap_ffn_for_persistent(llama(), "all", 4, seed=1)
    with torch.no_grad():
        whole = swapped(IDS).logits
        out = swapped(IDS[:, :4], use_cache=True)
        rest = [out.logits]
        for part in (IDS[:, 4:6], IDS[:, 6:7], IDS[:, 7:]):
            out = swapped(part, past_key_values=out.past_key_values, use_cache=True)
            rest.append(out.logits)
        assert torch.allclose(torch.cat(rest, 1), whole, atol=1e-5)
        padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), IDS], 1)
        mask = (padded > 0).long()
        left = swapped(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[:, 3:]
        assert torch.allclose(left, whole, atol=1e-5)
        made = swapped.generate(IDS, max_new_tokens=4, do_sample=False, eos_token_id=None)
        ids = IDS
        for _ in range(4):
            ids = torch.cat([ids, swapped(ids).logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(made, ids)


def test_masks_of_eager_attention_are_read_too() -> None:
    model = llama()
    expected = swap_ffn_for_persistent(model, "all", 4)[0](IDS).logits
    model.set_attn_implementation("eager")
    assert torch.allclose(swap_ffn_for_persistent(model, "all", 4)[0](IDS).logits, expected, atol=1e-5)


def test_saved_and_loaded(tmp_path: Path) -> None:
    swapped, paths = swap_ffn_for_persistent(llama(), [0, 2], 4, seed=1)
    lw.save(swapped, tmp_path / "out")
    loaded, _ = lw.load(tmp_path / "out")
    assert tuple(find_persistent(loaded)) == paths
    assert torch.allclose(loaded(IDS).logits, swapped(IDS).logits, atol=1e-6)
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in swapped.parameters())


def test_it_learns_and_its_vectors_are_used() -> None:
    swapped, paths = swap_ffn_for_persistent(llama(), "all", 16)
    swapped.train().requires_grad_(False)
    for memory in find_persistent(swapped).values():
        memory.requires_grad_(True)
    trained = [p for p in swapped.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, 1e-2)
    losses = []
    for _ in range(15):
        loss = swapped(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2
    mass = persistent_mass(swapped, IDS)
    assert tuple(mass) == paths
    for share in mass.values():
        assert bool(((share > 0) & (share < 1)).all())


def test_seeds_and_half_precision() -> None:
    model = llama()
    first, again, other = (swap_ffn_for_persistent(model, "all", 4, seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first(IDS).logits, again(IDS).logits)
    assert not torch.equal(first(IDS).logits, other(IDS).logits)
    expected = first(IDS).logits
    half, _ = swap_ffn_for_persistent(llama().to(torch.bfloat16), "all", 4, seed=1)
    assert half(IDS).logits.dtype == torch.bfloat16
    assert torch.allclose(half(IDS).logits.float(), expected, atol=0.1)


def test_wrong_settings() -> None:
    model = llama()
    with pytest.raises(InputError, match="num_vectors: got 0"):
        swap_ffn_for_persistent(model, "all", 0)
    with pytest.raises(InputError, match="unknown block"):
        swap_ffn_for_persistent(model, [99], 4)
    swapped, _ = swap_ffn_for_persistent(model, [0], 4)
    with pytest.raises(InputError, match="has persistent vectors already"):
        swap_ffn_for_persistent(swapped, [0], 4)
    assert len(find_persistent(swap_ffn_for_persistent(swapped, [1], 4)[0])) == 2
    with pytest.raises(TypeError, match="has no self_attn"):
        swap_ffn_for_persistent(ZOO["gpt2"]()[0], "all", 4)
    with pytest.raises(TypeError, match="model"):
        swap_ffn_for_persistent(torch.nn.Linear(3, 3), "all", 4)
    with pytest.raises(TypeError, match=r"sliding window|with q_norm"):
        swap_ffn_for_persistent(ZOO["gemma3"]()[0], "all", 4)
    windowed = ZOO["mistral"]()[0]
    windowed.config.sliding_window = 4
    with pytest.raises(TypeError, match="sliding window is not supported"):
        swap_ffn_for_persistent(windowed, [0], 4)
    windowed.config.sliding_window = None
    assert torch.isfinite(swap_ffn_for_persistent(windowed, [0], 4)[0](IDS).logits).all()
