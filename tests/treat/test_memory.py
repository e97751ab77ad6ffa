"""Llamas with a memory: nothing changes while it is empty, long text, generation, cross-batch training, on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import layerwright as lw
from layerwright.core.errors import InputError
from layerwright.core.layers import structure_copy
from layerwright.explain.positive_mass import positive_attention_mass
from layerwright.nn.memory_attention import MemoryAttention
from layerwright.nn.replace import MODULES
from layerwright.treat.memory import add_memory, find_memory
from zoo import ZOO

IDS = torch.randint(1, 90, (2, 12), generator=torch.Generator().manual_seed(0))


def llama() -> Any:
    return ZOO["llama"]()[0].eval()


def test_an_empty_memory_changes_nothing() -> None:
    model = llama()
    before = model(IDS).logits
    handle = add_memory(model, [1, 3])
    assert handle.layers == ("model.layers.1", "model.layers.3")
    assert torch.allclose(handle.model(IDS).logits, before, atol=1e-6)
    memory = handle.memories[0]
    memory.calls.write = True  # its own path, with nothing in the store yet
    assert torch.allclose(handle.model(IDS, use_cache=False).logits, before, atol=1e-5)
    memory.calls.write = False
    assert handle.held == 12
    assert not torch.allclose(handle.model(IDS).logits, before, atol=1e-3)
    handle.reset()
    assert torch.allclose(handle.model(IDS).logits, before, atol=1e-6)
    assert find_memory(model) is None
    assert torch.equal(handle.remove()(IDS).logits, before)
    assert find_memory(handle.model) is None


@pytest.mark.parametrize("position", ["first", "none"])
@pytest.mark.parametrize("temperature", ["sqrt", "learned"])
def test_reading_is_what_cross_batch_training_computes(position: Any, temperature: Any) -> None:
    """One earlier window in the memory, and the same window as the positive of a batch."""
    handle = add_memory(llama(), [1], position=position, temperature=temperature, dtype=None)
    with torch.no_grad():
        with handle.crossing(1):
            trained = handle.model(torch.cat([IDS[:, :6], IDS[:, 6:]]), use_cache=False).logits
        with handle.crossing(2, "packed", torch.tensor([1, 2])):
            packed = handle.model(IDS[:1].view(2, 6), use_cache=False).logits
    read = handle.logits(IDS, window=6)
    assert torch.allclose(trained[:2], read[:, :6], atol=1e-5)
    assert torch.allclose(trained[2:], read[:, 6:], atol=1e-5)
    assert torch.allclose(packed.flatten(0, 1), read[0], atol=1e-5)
    assert handle.held == 12


def test_what_was_read_is_seen_and_padding_is_not() -> None:
    handle = add_memory(llama(), [2], dtype=None)
    handle.read(IDS[:, :7], window=4)
    assert handle.held == 7
    first = handle.model(IDS[:, 7:]).logits
    handle.reset()
    padded = torch.cat([IDS[:, :7], torch.full((2, 1), 5)], 1)
    mask = torch.ones_like(padded)
    mask[:, -1] = 0
    handle.read(padded, window=4, attention_mask=mask)
    assert handle.held == 8
    assert torch.allclose(handle.model(IDS[:, 7:]).logits, first, atol=1e-5)
    handle.reset([0])
    after = handle.model(IDS[:, 7:]).logits
    assert torch.allclose(after[1], first[1], atol=1e-5)
    assert not torch.allclose(after[0], first[0], atol=1e-3)
    with pytest.raises(InputError, match="rows: got"):
        handle.reset([7])


def test_all_keys_chosen_are_all_keys() -> None:
    outs = []
    for top_k in (None, 8, 400):
        handle = add_memory(llama(), [0, 1], top_k=top_k, dtype=None)
        handle.read(IDS[:, :8])
        outs.append(handle.model(IDS[:, 8:]).logits)
    assert torch.allclose(outs[0], outs[1], atol=1e-5)
    assert torch.allclose(outs[0], outs[2], atol=1e-5)


def test_generation_reads_the_text_and_goes_on_past_a_window() -> None:
    handle = add_memory(llama(), [1], dtype=None)
    made = handle.generate(IDS, 9, last_context_length=4, window=8, do_sample=False, eos_token_id=None)
    assert made.shape == (2, 21)
    other = add_memory(llama(), [1], dtype=None)
    ids, start = IDS, 8
    other.read(IDS[:, :8], 8)
    for _ in range(9):
        if ids.shape[1] - start >= 8:
            other.read(ids[:, start : ids.shape[1] - 4], 8)
            start = ids.shape[1] - 4
        ids = torch.cat([ids, other.model(ids[:, start:], use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(made, ids)
    plain = llama().generate(IDS, max_new_tokens=3, do_sample=False, eos_token_id=None)
    handle.reset()
    assert torch.equal(handle.generate(IDS, 3, last_context_length=12, do_sample=False, eos_token_id=None), plain)


def test_rows_that_end_stay_ended() -> None:
    handle = add_memory(llama(), [1], dtype=None)
    made = handle.generate(IDS, 9, last_context_length=4, window=8, do_sample=False, eos_token_id=None)
    end = int(made[0, 13])
    handle.reset()
    again = handle.generate(
        IDS, 9, last_context_length=4, window=8, do_sample=False, eos_token_id=end, pad_token_id=end
    )
    assert bool((again[0, 13:] == end).all())


def test_gradients_of_a_model_reach_negatives() -> None:
    handle = add_memory(llama(), [1])
    embeddings = handle.model.get_input_embeddings()(torch.cat([IDS[:, :6], IDS[:, 6:]])).detach().requires_grad_()
    with handle.crossing(2):
        handle.model(inputs_embeds=embeddings, use_cache=False).logits[2].square().sum().backward()
    assert [bool(row.any()) for row in embeddings.grad] == [True, True, True, False]


def test_mass_on_the_positive() -> None:
    handle = add_memory(llama(), [1, 2])
    ids = torch.randint(1, 90, (8, 6), generator=torch.Generator().manual_seed(1))
    found = positive_attention_mass(handle.model, {"input_ids": ids}, 4)
    assert tuple(found) == handle.layers
    assert all(0.15 < share < 0.4 for share in found.values())  # nothing was learned: about a quarter
    assert positive_attention_mass(handle.model, {"input_ids": ids}, 1) == dict.fromkeys(
        handle.layers, pytest.approx(1)
    )
    same = ids.clone()
    same[:4] = ids[:1]
    equal = positive_attention_mass(handle.model, {"input_ids": same}, 4)
    assert list(equal.values()) == pytest.approx([0.25, 0.25], abs=1e-5)
    queries = torch.zeros(4, 6, dtype=torch.bool)
    queries[2, 3] = True
    one = positive_attention_mass(handle.model, {"input_ids": ids}, 4, queries)
    assert one != found
    with pytest.raises(InputError, match="no memory layers"):
        positive_attention_mass(llama(), {"input_ids": ids}, 2)


def test_saved_and_loaded(tmp_path: Path) -> None:
    if "memory_attention" not in MODULES:
        MODULES.add("memory_attention", "layerwright.nn.memory_attention:MemoryAttention")
    handle = add_memory(llama(), [1], position="none", temperature="learned", dtype=None)
    handle.memories[0].log_temperature.data += 0.3
    lw.save(handle.model, tmp_path / "out")
    loaded, _ = lw.load(tmp_path / "out")
    again = find_memory(loaded)
    assert again is not None
    assert again.layers == handle.layers
    assert torch.allclose(again.logits(IDS, window=5), handle.logits(IDS, window=5), atol=1e-6)


def test_half_precision_and_copies() -> None:
    handle = add_memory(llama().to(torch.bfloat16), [1])
    handle.read(IDS[:, :8])
    out = handle.model(IDS[:, 8:]).logits
    assert out.dtype == torch.bfloat16
    exact = add_memory(llama(), [1], dtype=None)
    exact.read(IDS)
    exact.reset()
    exact.read(IDS[:, :8])
    assert torch.allclose(out.float(), exact.model(IDS[:, 8:]).logits, atol=0.1)
    copied = find_memory(structure_copy(exact.model))
    assert copied is not None
    assert copied.held == 0
    assert exact.held == 8


def test_a_second_handle_leaves_the_first_its_say() -> None:
    handle = add_memory(llama(), [1, 3], dtype=None)
    again = find_memory(handle.model)
    assert again is not None
    handle.read(IDS)
    assert handle.held == again.held == 12
    again.reset()
    positive_attention_mass(handle.model, {"input_ids": IDS}, 1)
    handle.read(IDS[:, :5])
    assert handle.held == 5
    copied = find_memory(structure_copy(handle.model))
    assert copied is not None
    with copied.writing():
        handle.model(IDS, use_cache=False)
    assert handle.held == 5


def test_wrong_calls() -> None:
    model = llama()
    with pytest.raises(InputError, match="unknown block"):
        add_memory(model, [99])
    with pytest.raises(InputError, match="top_k: got 0"):
        add_memory(model, [1], top_k=0)
    with pytest.raises(TypeError, match="no self_attn"):
        add_memory(ZOO["gpt2"]()[0], [1])
    with pytest.raises(TypeError, match=r"sliding window|with q_norm"):
        add_memory(ZOO["gemma3"]()[0], "all")
    with pytest.raises(TypeError, match="sliding window"):
        add_memory(ZOO["gemma2"]()[0], [0])
    windowed = ZOO["mistral"]()[0]
    windowed.config.sliding_window = 4
    with pytest.raises(TypeError, match="sliding window is not supported"):
        add_memory(windowed, [0])
    handle = add_memory(model, [1])
    with pytest.raises(InputError, match="was changed already"):
        add_memory(handle.model, [1])
    with pytest.raises(InputError, match="window: got 99999"):
        handle.read(IDS, window=99999)
    with pytest.raises(InputError, match="last_context_length: got 8"):
        handle.generate(IDS, 2, last_context_length=8, window=8)
    with pytest.raises(InputError, match="num_contexts: got 3 for a batch of 1"), handle.crossing(3):
        handle.model(IDS, use_cache=False)
    mask = torch.ones_like(IDS)
    mask[0, -2:] = 0
    with pytest.raises(InputError, match="padding"), handle.crossing(1):
        handle.model(IDS, attention_mask=mask, use_cache=False)
    with pytest.raises(InputError, match="use_cache=False"), handle.writing():
        handle.model(IDS, use_cache=True)
    with pytest.raises(InputError, match="is not called itself"):
        MemoryAttention(4, 2, 6)(IDS)
