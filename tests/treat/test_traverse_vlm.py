"""Traversal inside a vision-language model of transformers, built from its configuration."""

from __future__ import annotations

from typing import Any

import torch

from layerwright.core.blocks import find_blocks
from layerwright.treat.traverse import traverse
from layerwright.tune._loop import Schedule
from layerwright.tune.two_step import Stage, two_step

IMAGE = 3
TEXT_BLOCKS = [f"model.language_model.layers.{number}" for number in range(3)]


def llava() -> tuple[Any, dict[str, torch.Tensor]]:
    """A Llava of a CLIP encoder (2 blocks, 16 patches) and a Llama (3 blocks), and a batch with one image a sample."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    text = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    vision = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config).eval()
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 96, (2, 22), generator=draw)
    ids[:, 1:17] = IMAGE
    labels = ids.clone()
    labels[:, :20] = -100
    return model, {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(2, 3, 16, 16, generator=draw),
        "labels": labels,
    }


def test_text_blocks_run_twice_on_image_and_question() -> None:
    model, batch = llava()
    assert [stack.role for stack in find_blocks(model)] == ["vision", "decoder"]
    handle = traverse(model, TEXT_BLOCKS, init_gate=0.5)
    with torch.no_grad():
        plain, traversed = model(**batch).logits, handle.model(**batch).logits
    assert [tuple(gate.shape) for gate in handle.gates() if gate is not None] == [(2, 22)] * 3
    assert not torch.allclose(plain, traversed, atol=1e-4)
    for mixer in handle.mixers:
        mixer.bias.data.fill_(-30.0)  # type: ignore[union-attr, operator]
    with torch.no_grad():
        torch.testing.assert_close(handle.model(**batch).logits, plain, atol=1e-5, rtol=1e-5)


def test_generation_runs_the_prompt_twice_and_each_new_token_once() -> None:
    model, batch = llava()
    handle = traverse(model, TEXT_BLOCKS)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    settings: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    produced = handle.model.generate(**inputs, **settings)  # type: ignore[operator]
    assert produced.shape == (2, 26)
    assert all(gate is None for gate in handle.gates())  # the last call was a single token


def test_two_steps_train_projector_and_gates_then_adapters() -> None:
    model, batch = llava()
    handle = traverse(model, TEXT_BLOCKS)
    adapted = tuple(f"{block}.self_attn.{name}" for block in TEXT_BLOCKS for name in ("q_proj", "v_proj"))
    stages = (
        Stage(("multi_modal_projector", "mixers"), Schedule(4, 1e-2)),
        Stage(("multi_modal_projector", "mixers", "lora"), Schedule(4, 1e-2), rank=2, targets=adapted),
    )
    tuned = two_step(handle.model, [batch], stages)
    before, after = dict(handle.model.named_parameters()), dict(tuned.named_parameters())
    assert set(before) == set(after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("multi_modal_projector" in name for name in changed)
    assert any("mixer" in name for name in changed) and any("language_model" in name for name in changed)
    assert not any(name.startswith("model.vision_tower") for name in changed)  # the encoder stays frozen
    with torch.no_grad():
        assert float(tuned(**batch).loss) < float(handle.model(**batch).loss)
