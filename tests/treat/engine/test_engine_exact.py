from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from engine_models import ARCHITECTURES, decoder, hf_logits, ragged
from layerwright.core.errors import InputError
from layerwright.core.layer import read_matrix
from layerwright.core.layers import treatable
from layerwright.core.treatment import Quantize, Sparsify
from layerwright.nn import Stored, replace_
from layerwright.nn.quantizer import find_scale, quantize
from layerwright.treat.compute import treated
from layerwright.treat.engine import InferenceModel, Sampling, compile_inference
from layerwright.treat.engine._products import can_pack
from layerwright.treat.narrow import feed_forwards, keep_neurons_

LAYOUTS = ("auto", "plain", "packed")


def follow(engine: InferenceModel, model: Any, steps: int = 6) -> float:
    """Largest difference to transformers over a prompt and steps that follow its tokens."""
    ids, mask = ragged()
    logits, worst = engine.prefill(ids, mask), 0.0
    for _ in range(steps):
        expected = hf_logits(model, ids, mask)
        worst = max(worst, float((expected.float() - logits.float()).abs().max()))
        token = expected.argmax(-1)
        ids, mask = torch.cat([ids, token[:, None]], 1), torch.cat([mask, torch.ones_like(token)[:, None]], 1)
        logits = engine.step(token)
    return max(worst, float((hf_logits(model, ids, mask).float() - logits.float()).abs().max()))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_of_a_ragged_batch_are_those_of_transformers(name: str, layout: Any) -> None:
    model = decoder(name)
    for fold in (True, False):
        engine = compile_inference(model, max_batch=4, max_length=24, layout=layout, fold_norms=fold)
        assert follow(engine, model) < 1e-4


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_bfloat16_is_as_near_to_float32_as_transformers(name: str, layout: Any) -> None:
    model = decoder(name)
    half = copy.deepcopy(model).to(torch.bfloat16)
    if layout == "packed" and not can_pack(torch.empty(1, 1, dtype=torch.bfloat16)):
        with pytest.raises(InputError, match=r"layout: 'packed'.*bfloat16"):
            compile_inference(half, max_batch=4, max_length=24, layout=layout)
        return
    exact = copy.deepcopy(half).float()
    ids, mask = ragged(4, 16)
    expected, theirs = hf_logits(exact, ids, mask), hf_logits(half, ids, mask).float()
    engine = compile_inference(half, max_batch=4, max_length=24, layout=layout)
    ours = engine.prefill(ids, mask).float()
    ours_step = one_by_one(compile_inference(half, max_batch=4, max_length=24, layout=layout), ids, mask)

    def off(found: Tensor) -> float:
        return float((found - expected).square().mean().sqrt())

    assert off(theirs) > 0
    assert off(ours) < 1.25 * off(theirs)
    assert off(ours_step) < 1.25 * off(theirs)


def one_by_one(engine: InferenceModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits after a prompt of which all but the first real column is stepped."""
    first = int((1 - mask).sum(1).max()) + 1
    logits = engine.prefill(ids[:, :first], mask[:, :first])
    for column in range(first, ids.shape[1]):
        logits = engine.step(ids[:, column])
    return logits.float().clone()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_tokens_are_those_of_generate(name: str) -> None:
    model = decoder(name)
    ids, mask = ragged(5, 12, seed=3)
    expected = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=16, do_sample=False)
    found = compile_inference(model, max_batch=5, max_length=32).generate(ids, mask, 16)
    assert torch.equal(found.tokens, expected)
    new = expected[:, 12:]
    ended = (new == model.generation_config.eos_token_id).int()
    lengths = torch.where(ended.any(1), ended.argmax(1) + 1, new.shape[1])
    assert torch.equal(found.lengths, lengths)


@pytest.mark.parametrize(
    "settings", [{"top_k": 20, "top_p": 0.9}, {"top_k": 0, "top_p": 0.5}, {"top_k": 3, "top_p": 1.0}]
)
def test_drawn_tokens_are_those_of_generate(settings: dict[str, Any]) -> None:
    model = decoder("llama")
    ids, mask = ragged(3, 8, seed=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        expected = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=12, do_sample=True, temperature=0.7, **settings
        )
    engine = compile_inference(model, max_batch=3, max_length=24)
    found = engine.generate(ids, mask, 12, Sampling(0.7, **settings), generator=torch.Generator().manual_seed(11))
    assert torch.equal(found.tokens, expected)
    other = engine.generate(ids, mask, 12, Sampling(0.7, **settings), generator=torch.Generator().manual_seed(12))
    assert not torch.equal(found.tokens[:, :20], other.tokens[:, :20])


@pytest.mark.parametrize("early", [False, True, "never"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_beams_are_those_of_generate(name: str, early: Any) -> None:
    model = decoder(name)
    ids, mask = ragged(3, 8, seed=2)
    engine = compile_inference(model, max_batch=9, max_length=24)
    for beams, penalty in ((2, 1.0), (3, 0.0), (3, 2.0), (2, -1.0)):
        expected = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=12,
            do_sample=False,
            num_beams=beams,
            early_stopping=early,
            length_penalty=penalty,
        )
        sampling = Sampling(num_beams=beams, early_stopping=early, length_penalty=penalty)
        assert torch.equal(engine.generate(ids, mask, 12, sampling).tokens, expected)


def test_a_padded_batch_equals_each_prompt_alone() -> None:
    model = decoder("qwen3")
    ids, mask = ragged()
    engine = compile_inference(model, max_batch=4, max_length=24)
    together = engine.prefill(ids, mask)
    for row in range(4):
        alone = engine.prefill(ids[row][mask[row] == 1][None])[0]
        torch.testing.assert_close(together[row], alone, atol=1e-5, rtol=1e-5)


def test_parts_of_a_prompt_equal_the_whole() -> None:
    model = decoder("llama")
    ids, mask = ragged()
    whole = compile_inference(model, max_batch=4, max_length=24)
    parts = compile_inference(model, max_batch=4, max_length=24, prompt_chunk=12)
    torch.testing.assert_close(parts.prefill(ids, mask), whole.prefill(ids, mask), atol=1e-5, rtol=1e-5)
    token = torch.tensor([5, 6, 7, 8])
    torch.testing.assert_close(parts.step(token), whole.step(token), atol=1e-5, rtol=1e-5)


def test_truncating_goes_on_as_if_nothing_had_been() -> None:
    model = decoder("llama")
    ids, mask = ragged()
    engine = compile_inference(model, max_batch=4, max_length=24)
    engine.prefill(ids, mask)
    expected = engine.step(ids[:, 0]).clone()
    for column in range(1, 4):
        engine.step(ids[:, column])
    engine.truncate(10)
    torch.testing.assert_close(engine.step(ids[:, 0]), expected, atol=0, rtol=0)


def test_reordered_rows_go_on_like_their_sources() -> None:
    model = decoder("gpt2")
    ids, mask = ragged()
    engine = compile_inference(model, max_batch=4, max_length=24)
    index, token = torch.tensor([2, 2, 0, 1]), torch.tensor([9, 9, 9, 9])
    engine.prefill(ids, mask)
    engine.reorder(index)
    found = engine.step(token).clone()
    engine.prefill(ids[index], mask[index])
    torch.testing.assert_close(found, engine.step(token), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_encode_gives_the_last_hidden_states(name: str) -> None:
    model = decoder(name)
    ids, mask = ragged()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = model.base_model(input_ids=ids, attention_mask=mask, position_ids=positions).last_hidden_state
    engine = compile_inference(model, max_batch=4, max_length=24)
    engine.prefill(ids, mask)
    found = engine.encode(ids, mask)
    torch.testing.assert_close(found[mask == 1], expected[mask == 1], atol=1e-4, rtol=1e-4)
    assert engine.cache.length == 10


def test_rows_of_unequal_length_step_together() -> None:
    model = decoder("llama")
    ids, mask = ragged()
    for kind in (torch.float32, torch.bfloat16):
        engine = compile_inference(model.to(kind), max_batch=4, max_length=24)
        expected, lengths = [], mask.sum(1)
        token = torch.tensor([5, 6, 7, 8])
        for row in range(4):
            engine.prefill(ids[row][mask[row] == 1][None])
            expected.append(engine.step(token[row : row + 1])[0].clone())
        for row in range(4):
            prompt = ids[row][mask[row] == 1]
            engine.prefill_row(row, prompt[:1])
            if len(prompt) > 1:
                engine.prefill_row(row, prompt[1:], 1)
        tolerance = 1e-5 if kind == torch.float32 else 0.1
        found = engine.step_rows(token, lengths)
        torch.testing.assert_close(found, torch.stack(expected), atol=tolerance, rtol=tolerance)


def test_the_model_is_left_alone_and_may_change_later() -> None:
    model = decoder("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids, mask = ragged()
    engine = compile_inference(model, max_batch=4, max_length=24)
    expected = engine.prefill(ids, mask)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.up_proj.weight.zero_()
    assert torch.equal(engine.prefill(ids, mask), expected)


def test_blocks_of_unequal_width() -> None:
    model = decoder("llama")
    parts = feed_forwards(model)
    for number, part in enumerate(list(parts.values())[:2]):
        keep_neurons_(model, part, torch.arange(24 + 16 * number))
    for layout in LAYOUTS:
        engine = compile_inference(model, max_batch=4, max_length=24, layout=layout)  # type: ignore[arg-type]
        assert follow(engine, model) < 1e-4


def packed(model: Any, settings: Quantize) -> Any:
    copied = copy.deepcopy(model)
    for ref in treatable(copied):
        weight = read_matrix(copied, ref)
        scale, zero = find_scale(
            weight, settings.bits, settings.group_size, settings.symmetric, scale_dtype=weight.dtype
        )
        codes = quantize(weight, scale.float(), zero, settings.bits)
        replace_(copied, ref, Stored((1, *ref.shape), codes=codes, scale=scale, zero=zero, quantize=settings))
    return copied


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize(
    "settings", [Quantize(4, 32, True, "rtn"), Quantize(4, 32, False, "rtn"), Quantize(8, -1, True, "rtn")]
)
def test_integer_layers_compute_what_their_codes_say(name: str, settings: Quantize) -> None:
    model = packed(decoder(name).to(torch.bfloat16), settings)
    exact = copy.deepcopy(decoder(name)).to(torch.bfloat16).float()
    for ref in treatable(exact):
        holder = exact.get_submodule(ref.path)
        dense = model.get_submodule(ref.path).dequantize(torch.float32)
        with torch.no_grad():
            holder.weight.copy_(dense.t() if type(holder).__name__ == "Conv1D" else dense)
    ids, mask = ragged(4, 16)
    expected = hf_logits(exact, ids, mask)
    for prompts in ("codes", "dense"):
        engine = compile_inference(model, max_batch=4, max_length=24, prompt_weights=prompts)  # type: ignore[arg-type]
        assert type(engine.decoder.blocks[0].qkv).__name__ == "KernelProduct"
        for found in (engine.prefill(ids, mask).float(), one_by_one(engine, ids, mask)):
            assert float((found - expected).square().mean().sqrt()) < 0.025 * float(expected.std())


def test_layers_of_other_forms_run_as_they_are() -> None:
    model = decoder("llama")
    for number, ref in enumerate(treatable(model)):
        if number % 3 == 0:
            continue
        treatment = Quantize(4, 32, True, "rtn") if number % 3 == 1 else Sparsify(0.5, "2:4", "magnitude")
        stored, _ = treated(read_matrix(model, ref), (treatment,), None, scale_dtype=torch.float32)
        replace_(model, ref, stored)
    engine = compile_inference(model, max_batch=4, max_length=24)
    kinds = {type(block.qkv).__name__ for block in engine.decoder.blocks}
    assert "JoinedProduct" in kinds
    assert follow(engine, model) < 1e-4
