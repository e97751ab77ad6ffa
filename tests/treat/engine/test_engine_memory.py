from __future__ import annotations

import resource
from typing import Any

import pytest
import torch

from engine_models import decoder, ragged
from layerwright.studies.sequence import tiny_llama
from layerwright.treat.engine import InferenceModel, Sampling, compile_inference
from layerwright.treat.engine._counting import Allocations


def allocated(engine: InferenceModel, rows: int) -> list[int]:
    """Bytes of what a step in steady state allocates, above 1 kB."""
    ids, mask = ragged(rows, 10)
    engine.prefill(ids, mask)
    token = torch.zeros(rows, dtype=torch.long)
    for _ in range(2):
        engine.step(token)
    with Allocations(1024) as seen:
        engine.step(token)
    assert seen.operations > 50
    return seen.sizes


@pytest.mark.parametrize("rows", [1, 4])
def test_a_step_in_float32_allocates_nothing(rows: int) -> None:
    model = tiny_llama(256, 3, 8, kv_heads=2).eval()
    assert allocated(compile_inference(model, rows, 64, layout="plain"), rows) == []
    packed = allocated(compile_inference(model, rows, 64, layout="packed"), rows)
    assert len(packed) >= 3 * 2  # products at least: the counter sees them


def test_the_counter_sees_what_is_new() -> None:
    x = torch.zeros(1000)
    with Allocations(1024) as seen:
        x.add_(1)
        x.view(10, 100)[2:].mul_(2)
        x[:10] + 1
        x + 1
    assert seen.sizes == [4000]


def test_the_workspace_does_not_grow_with_depth_and_is_less_than_half() -> None:
    reports = {}
    for layers in (2, 6):
        engine = compile_inference(tiny_llama(256, layers, 8, kv_heads=2).eval(), 4, 256, layout="plain")
        reports[layers] = engine.memory_report()
    assert reports[2]["workspace"] == reports[6]["workspace"]
    assert reports[6]["workspace"] <= 0.5 * reports[6]["workspace_without_reuse"]
    assert reports[6]["cache"] == 3 * reports[2]["cache"] == 6 * 2 * 4 * 2 * 256 * 32 * 4


def test_memory_is_constant_over_calls() -> None:
    model = tiny_llama(64, 2, 4).eval()
    engine = compile_inference(model, 4, 64)
    ids, mask = ragged(4, 16)
    places = [layer.data_ptr() for layer in engine.cache.layers]
    engine.generate(ids, mask, 16)
    report = engine.memory_report()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(100):
        engine.generate(ids, mask, 16)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 4096  # kilobytes: no more than the allocator's own noise
    assert engine.memory_report() == report
    assert [layer.data_ptr() for layer in engine.cache.layers] == places


def test_reports_add_up() -> None:
    model = decoder("llama")
    engine = compile_inference(model, 2, 32, layout="plain", fold_norms=False)
    ids, _ = ragged(2, 8)
    engine.generate(ids, torch.ones_like(ids), 4)
    memory, times = engine.memory_report(), engine.timing_report()
    parameters = sum(p.nbytes for p in model.parameters())
    turns = 32 * 4 * 8
    assert memory["weights"] == parameters + turns
    assert memory["peak"] == sum(memory[k] for k in ("weights", "cache", "workspace", "logits_and_stream", "prompt"))
    assert times["prompt_tokens"] == 16
    assert times["steps"] == 3 and times["new_tokens"] == 6
    assert times["ms_per_step"] > 0


def refused(words: str, **settings: Any) -> None:
    model = settings.pop("model", None) or decoder("llama")
    with pytest.raises((ValueError, TypeError), match=words):
        compile_inference(model, **{"max_batch": 2, "max_length": 32, **settings})


def test_models_that_are_refused() -> None:
    import zoo

    for name in ("bert", "gemma2", "mixtral", "opt"):
        with pytest.raises(TypeError, match=r"gpt2 \(GPT2LMHeadModel\), llama"):
            compile_inference(zoo.ZOO[name]()[0])
    for name in ("qwen2", "mistral"):
        refused("sliding_window: got 6 for max_length 32", model=zoo.ZOO[name]()[0])
    refused("training mode", model=decoder("llama").train())
    wanted = decoder("llama")
    wanted.config._attn_implementation = "eager"
    wanted.config.output_attentions = True
    refused("output_attentions", model=wanted)
    hooked = decoder("llama")
    hooked.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    refused("model.layers.1.mlp: it has forward hooks", model=hooked)
    turning = decoder("llama")
    turning.model.rotary_emb.rope_type = "dynamic"
    refused("rope_type: got 'dynamic'", model=turning)
    odd = decoder("llama")
    odd.config.hidden_act = "tanh"
    refused("activation: got 'tanh'", model=odd)


def test_a_changed_block_is_refused() -> None:
    from layerwright.treat.traverse import traverse

    handle = traverse(decoder("llama"))
    refused("its class was changed", model=handle.model)


def test_settings_that_are_refused() -> None:
    refused("max_batch: got 0", max_batch=0)
    refused("max_length: got 65, the model has positions for 64", max_length=65)
    refused("prompt_chunk", prompt_chunk=0)
    refused("unknown layout 'fast'", layout="fast")
    refused("unknown prompt_weights", prompt_weights="fast")
    refused("dtype: got torch.float16 on cpu", dtype=torch.float16)
    refused("dtype: got torch.int8", dtype=torch.int8)


def test_calls_that_are_refused() -> None:
    engine = compile_inference(decoder("llama"), 2, 16)
    ids, mask = ragged(2, 8)
    token = torch.tensor([3, 4])

    def fails(words: str, call: Any) -> None:
        with pytest.raises(ValueError, match=words):
            call()

    fails("call prefill first", lambda: engine.step(token))
    fails("got 3 sequences, expected 1 to max_batch 2", lambda: engine.prefill(ids[[0, 1, 1]]))
    fails("got 17 tokens", lambda: engine.prefill(torch.zeros(1, 17, dtype=torch.long)))
    fails("token 96 is outside the vocabulary of 96", lambda: engine.prefill(torch.tensor([[96]])))
    fails("token -1 is outside", lambda: engine.prefill(torch.tensor([[-1]])))
    fails("whole numbers", lambda: engine.prefill(torch.zeros(1, 3)))
    fails("attention_mask: padding must be on the left", lambda: engine.prefill(ids, mask.flip(1)))
    fails("attention_mask: got shape", lambda: engine.prefill(ids, mask[:, 1:]))
    fails("attention_mask: a sequence has no tokens", lambda: engine.prefill(ids, mask * 0))
    fails("8 tokens and 9 more exceed max_length 16", lambda: engine.generate(ids, mask, 9))
    fails("max_new_tokens: got 0", lambda: engine.generate(ids, mask, 0))
    fails("generator: a temperature draws", lambda: engine.generate(ids, mask, 2, Sampling(1.0)))
    fails("more than max_batch 2", lambda: engine.generate(ids, mask, 2, Sampling(num_beams=2)))
    fails(
        "streamer: beams",
        lambda: engine.generate(ids[:1], mask[:1], 2, Sampling(num_beams=2), streamer=lambda _: None),
    )
    for settings in ({"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"num_beams": 0}, {"early_stopping": "no"}):
        fails(next(iter(settings)), lambda settings=settings: Sampling(**settings))
    engine.prefill(ids, mask)
    fails("expected \\(2,\\), one for each prompt", lambda: engine.step(token[:1]))
    fails("length: got 9", lambda: engine.truncate(9))
    fails("row: got 2, expected 0 to 1", lambda: engine.prefill_row(2, ids[0]))
    fails("expected \\(n,\\) each", lambda: engine.step_rows(token, token[:1]))
    fails("9 tokens and 8 more exceed", lambda: engine.prefill_row(0, ids[0], 9))
    fails("16 tokens and 1 more exceed", lambda: engine.step_rows(token, torch.tensor([3, 16])))


def test_a_full_cache_is_refused_before_anything_is_written() -> None:
    engine = compile_inference(decoder("llama"), 2, 10)
    ids, mask = ragged(2, 9)
    engine.prefill(ids, mask)
    engine.step(ids[:, 0])
    before = [layer.clone() for layer in engine.cache.layers]
    with pytest.raises(ValueError, match="10 tokens and 1 more exceed max_length 10"):
        engine.step(ids[:, 0])
    assert all(torch.equal(a, b) for a, b in zip(before, engine.cache.layers, strict=True))
    assert engine.cache.length == 10


def test_a_streamer_gets_every_step() -> None:
    engine = compile_inference(decoder("gpt2"), 3, 32)
    ids, mask = ragged(3, 8)
    seen: list[torch.Tensor] = []
    found = engine.generate(ids, mask, 6, streamer=seen.append)
    assert torch.equal(torch.stack(seen, 1), found.tokens[:, 8:])


def test_blocks_without_all_heads_are_refused() -> None:
    model = decoder("llama")
    attention = model.model.layers[2].self_attn
    attention.k_proj = torch.nn.Linear(32, 8, bias=False)
    refused("attention: heads were removed; the engine needs 4 and 2 in every block", model=model)
    model = decoder("llama")
    model.model.layers[1].mlp.down_proj = torch.nn.Linear(48, 32, bias=False)
    refused("feed-forward part: 64 features go in and 48 are read", model=model)
