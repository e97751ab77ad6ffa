"""Blocks that run twice: against the loop written out, with a cache, and taken back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import layerwright as lw
from layerwright.treat.arrange import arrange_blocks
from layerwright.treat.export import dense_copy
from layerwright.treat.traverse import TraversalHandle, find_traversal, traverse
from oracles.traversal import naive_traversal
from zoo import ZOO

DECODERS = ("llama", "gpt2", "qwen2", "gpt_neox", "opt", "gemma2", "mixtral", "phi3")


def tiny(name: str = "llama") -> tuple[Any, Tensor]:
    model, batches = ZOO[name]()
    return model.eval(), batches[0]["input_ids"]


def traversed(name: str = "llama", **settings: Any) -> tuple[TraversalHandle, Any, Tensor]:
    """A traversed model whose gates differ by token."""
    model, ids = tiny(name)
    handle = traverse(model, **settings)
    generator = torch.Generator().manual_seed(0)
    for mixer in handle.mixers:
        mixer.weight.data = 0.3 * torch.randn(mixer.weight.shape, generator=generator)
    return handle, model, ids


def fix_gates_(handle: TraversalHandle, value: float) -> None:
    for mixer in handle.mixers:
        nn.init.zeros_(mixer.weight)  # type: ignore[arg-type]
        nn.init.constant_(mixer.bias, 30.0 * (2 * value - 1))  # type: ignore[arg-type]


def greedy(model: Any, ids: Tensor, **extra: Any) -> Tensor:
    result: Tensor = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None, **extra)
    return result


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_closed_gates_change_nothing(name: str) -> None:
    handle, model, ids = traversed(name)
    fix_gates_(handle, 0.0)
    assert torch.allclose(handle.model(ids).logits, model(ids).logits, atol=1e-5)
    assert torch.equal(greedy(handle.model, ids), greedy(model, ids))
    assert all(gate is None for gate in handle.gates())


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
@torch.no_grad()
def test_open_gates_run_every_block_twice(name: str) -> None:
    handle, model, ids = traversed(name)
    fix_gates_(handle, 1.0)
    kinds = getattr(model.config, "layer_types", None)
    order = [index for index in range(4) for _ in range(2)]
    doubled, _ = arrange_blocks(model, order)
    assert kinds is None or len(doubled.config.layer_types) == 8
    assert torch.allclose(handle.model(ids).logits, doubled(ids).logits, atol=1e-4)


@torch.no_grad()
def test_prompt_cache_and_decoding_are_those_of_the_loop() -> None:
    handle, model, ids = traversed()
    prompt = ids[:1]
    logits, kept, decoded = naive_traversal(model, prompt, list(handle.mixers), 4)
    output = handle.model(prompt, use_cache=True)
    assert torch.allclose(output.logits, logits, atol=1e-5)
    for layer, (keys, values) in zip(output.past_key_values.layers, kept, strict=True):
        assert torch.allclose(layer.keys, keys, atol=1e-5)
        assert torch.allclose(layer.values, values, atol=1e-5)
    assert [tuple(gate.shape) for gate in handle.gates() if gate is not None] == [(1, 12)] * 4
    last = output
    for step in range(4):
        last = handle.model(last.logits[:, -1:].argmax(-1), past_key_values=last.past_key_values, use_cache=True)
        assert torch.allclose(last.logits, decoded[:, step : step + 1], atol=1e-5)
        assert handle.gates() == [None] * 4


@torch.no_grad()
def test_a_single_token_runs_once() -> None:
    handle, model, ids = traversed()
    assert torch.equal(handle.model(ids[:, :1]).logits, model(ids[:, :1]).logits)
    assert handle.gates() == [None] * 4
    always, _, _ = traversed(prompt_only=False)
    assert not torch.allclose(always.model(ids[:, :1]).logits, model(ids[:, :1]).logits, atol=1e-3)
    assert all(gate is not None for gate in always.gates())


@torch.no_grad()
def test_prompts_in_parts() -> None:
    handle, model, ids = traversed()
    first = handle.model(ids[:, :6], use_cache=True)
    with pytest.raises(ValueError, match="past_key_values"):
        handle.model(ids[:, 6:], past_key_values=first.past_key_values, use_cache=True)
    parts, _, _ = traversed(chunked="first-pass-only")
    first = parts.model(ids[:, :6], use_cache=True)
    second = parts.model(ids[:, 6:], past_key_values=first.past_key_values, use_cache=True)
    assert parts.gates() == [None] * 4
    one_by_one = parts.model(ids[:, :6], use_cache=True)
    for place in range(6, 12):
        one_by_one = parts.model(ids[:, place : place + 1], past_key_values=one_by_one.past_key_values, use_cache=True)
    assert torch.allclose(second.logits[:, -1:], one_by_one.logits, atol=1e-5)
    with pytest.raises(ValueError, match="chunked"):
        traverse(model, chunked="all")  # type: ignore[arg-type]


def test_gradients_of_gates_are_finite_differences() -> None:
    handle, _, ids = traversed()
    model = handle.model
    mixer: Any = handle.mixers[1]

    def loss() -> Tensor:
        value: Tensor = model(input_ids=ids, labels=ids).loss
        return value

    loss().backward()
    step = 1e-2
    for place in (0, 7, 31):
        with torch.no_grad():
            found = []
            for sign in (1, -1):
                mixer.weight[place] += sign * step
                found.append(float(loss()))
                mixer.weight[place] -= sign * step
        assert float(mixer.weight.grad[place]) == pytest.approx((found[0] - found[1]) / (2 * step), rel=0.02, abs=1e-4)


def test_tokens_left_out_keep_to_the_first_pass() -> None:
    handle, model, ids = traversed()
    mask = torch.ones_like(ids)
    mask[:, 5:] = 0
    handle.set_traverse_mask(mask)
    handle.model(input_ids=ids)
    for gate in handle.gates():
        assert gate is not None
        assert not gate[:, 5:].any()
        assert bool((gate[:, :5] > 0).all())
    handle.set_traverse_mask(torch.zeros_like(ids))
    loss = handle.model(input_ids=ids, labels=ids).loss
    assert torch.allclose(loss, model(input_ids=ids, labels=ids).loss, atol=1e-5)
    loss.backward()
    assert all(not bool(p.grad.any()) for mixer in handle.mixers for p in mixer.parameters() if p.grad is not None)
    handle.set_traverse_mask(mask[:, :4])
    with pytest.raises(ValueError, match="traverse_mask"):
        handle.model(input_ids=ids)
    handle.set_traverse_mask(None)
    handle.model(input_ids=ids)


@torch.no_grad()
def test_removal_and_copies() -> None:
    model, ids = tiny()
    before = model(ids).logits
    kind = type(model.model.layers[0])
    handle = traverse(model, copy=False)
    assert sum(p.numel() for mixer in handle.mixers for p in mixer.parameters()) == 4 * (32 + 1)
    assert len(model(ids, output_hidden_states=True).hidden_states) == 5
    with pytest.raises(ValueError, match="traversed"):
        traverse(model)
    other = copy.deepcopy(model)
    assert torch.equal(other(ids).logits, model(ids).logits)
    assert handle.remove() is model
    assert all(type(block) is kind for block in model.model.layers)
    assert torch.equal(model(ids).logits, before)
    assert torch.equal(dense_copy(other)(ids).logits, before)
    found = find_traversal(other)
    assert found is not None
    assert torch.equal(found.remove()(ids).logits, before)
    assert find_traversal(model) is None


@torch.no_grad()
def test_save_and_load(tmp_path: Path) -> None:
    handle, _, ids = traversed(blocks=[1, 3], chunked="first-pass-only")
    lw.save(handle.model, tmp_path / "out")
    again, _ = lw.load(tmp_path / "out")
    assert torch.equal(again(ids).logits, handle.model(ids).logits)
    assert torch.equal(greedy(again, ids), greedy(handle.model, ids))
    found = find_traversal(again)
    assert found is not None
    assert found.blocks == ("model.layers.1", "model.layers.3")
    assert {traversal.chunked for traversal in found.traversals} == {"first-pass-only"}


@torch.no_grad()
def test_one_gate_for_all(tmp_path: Path) -> None:
    handle, _, ids = traversed(share_gate=True)
    assert len({id(mixer) for mixer in handle.mixers}) == 1
    assert sum(p.numel() for p in handle.mixers.parameters()) == 33
    with pytest.raises(ValueError, match="share_gate"):
        lw.save(handle.model, tmp_path / "out")
    before = handle.model(ids).logits
    handle.unshare()
    assert len({id(mixer) for mixer in handle.mixers}) == 4
    assert torch.equal(handle.model(ids).logits, before)
    lw.save(handle.model, tmp_path / "out")
    assert torch.equal(lw.load(tmp_path / "out")[0](ids).logits, before)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_left_padding_is_single_samples(attention: str) -> None:
    handle, _, ids = traversed()
    model: Any = handle.model
    model.set_attn_implementation(attention)
    short = ids[:1, 4:]
    both = torch.cat([torch.cat([torch.zeros(1, 4, dtype=ids.dtype), short], 1), ids[1:]])
    mask = torch.ones_like(both)
    mask[0, :4] = 0
    together = greedy(model, both, attention_mask=mask)
    assert torch.equal(together[0, 4:], greedy(model, short)[0])
    assert torch.equal(together[1:], greedy(model, ids[1:]))


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    found = []
    for checkpointing in (False, True):
        handle, _, ids = traversed()
        model: Any = handle.model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        found.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))


@torch.no_grad()
def test_half_precision() -> None:
    handle, _, ids = traversed()
    assert handle.model.to(torch.bfloat16)(ids).logits.dtype == torch.bfloat16


class _Halving(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(width, 32), nn.Linear(32, width)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.down_proj(self.up_proj(x).relu()))[:, ::2]


def test_bad_input() -> None:
    model, _ = tiny()
    for value in (0.0, 1.0, 2.0):
        with pytest.raises(ValueError, match="init_gate"):
            traverse(model, init_gate=value)
    with pytest.raises(ValueError, match="blocks"):
        traverse(model, [7])
    with pytest.raises(ValueError, match="blocks"):
        traverse(model, "some")
    with pytest.raises(TypeError, match="model"):
        traverse(nn.Linear(2, 2))
    shrinking = nn.Sequential(_Halving(16), _Halving(16))
    with pytest.raises(TypeError, match="blocks"):
        traverse(shrinking).model(torch.zeros(1, 8, 16))
