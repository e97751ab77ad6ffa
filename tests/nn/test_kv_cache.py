"""Budgeted caches against full ones, explicit masks and lists."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, StaticCache

from layerwright.core.errors import InputError
from layerwright.core.treatment import KVBudget
from layerwright.nn.kv import budget_cache_, cache_budgets, make_cache
from layerwright.nn.kv.attention import _RUNNING, budgeted_attention, cache_owners
from layerwright.nn.kv.cache import BudgetedCache, EvictedError, StaticCacheError, held_bytes
from layerwright.nn.kv.keep import choose_kept, past_mask, recent_tokens
from layerwright.nn.replace import module_from_spec, rebuild_, structure_of
from oracles.kv_policies import banded_mask, heavy_hitter_logits
from zoo import ZOO

POLICY = pytest.mark.parametrize("policy", ["window", "streaming", "h2o"])
KIND = pytest.mark.parametrize("kind", ["eager", "sdpa"])


def llama(layers: int = 2, kind: str = "sdpa", **settings: Any) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        attn_implementation=kind,
        initializer_range=0.2,
        **settings,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config).eval()


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 61, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def decode(model: Any, ids: Tensor, prompt: int, cache: Any, mask: Tensor | None = None) -> Tensor:
    """Logits of the prompt's last token and of each later one, fed one by one."""
    found = []
    for start, end in [(0, prompt), *((t, t + 1) for t in range(prompt, ids.shape[1]))]:
        own = None if mask is None else mask[:, :end]
        places = None if mask is None else (own.cumsum(-1) - 1).clamp(min=0)[:, start:end]
        out = model(
            input_ids=ids[:, start:end], attention_mask=own, position_ids=places, past_key_values=cache, use_cache=True
        )
        found.append(out.logits[:, -1])
    return torch.stack(found, 1)


def left_padded(ids: Tensor) -> Tensor:
    mask = torch.ones_like(ids)
    for row in range(1, len(ids)):
        mask[row, : 2 * row + 1] = 0
    return mask


@KIND
@POLICY
@pytest.mark.parametrize("padded", [False, True])
def test_a_budget_that_is_not_reached_changes_nothing(kind: str, policy: str, padded: bool) -> None:
    model, ids = llama(kind=kind), tokens(3, 14)
    mask = left_padded(ids) if padded else None
    plain = decode(model, ids, 9, DynamicCache(config=model.config), mask)
    cache = BudgetedCache(model.config, [14, 20], policy)
    with budgeted_attention(model):
        assert torch.equal(decode(model, ids, 9, cache, mask), plain)
    assert cache.get_seq_length() == 14
    assert model.config._attn_implementation == kind and not _RUNNING


@KIND
@pytest.mark.parametrize(("policy", "sinks"), [("window", 0), ("streaming", 3)])
def test_windows_are_banded_masks(kind: str, policy: str, sinks: int) -> None:
    model, ids = llama(kind=kind), tokens(2, 20)
    allowed = banded_mask(11, 20, 6, sinks)
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min).expand(2, -1, -1, -1)
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, 10:]
    with budgeted_attention(model):
        found = decode(model, ids, 11, BudgetedCache(model.config, 6, policy, sinks=sinks))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert not torch.allclose(model(input_ids=ids).logits[:, 10:], expected, atol=1e-3)


@KIND
@pytest.mark.parametrize("fraction", [0.5, 0.25])
def test_heavy_hitters_are_those_of_lists(kind: str, fraction: float) -> None:
    model, ids = llama(1, kind), tokens(2, 16)
    with budgeted_attention(model):
        cache = BudgetedCache(model.config, 6, "h2o", sinks=1, recent_fraction=fraction)
        found = decode(model, ids, 9, cache)
    slow = llama(1, "eager")
    expected = torch.cat([heavy_hitter_logits(slow, row[None], 9, 6, recent_tokens(6, fraction)) for row in ids])
    torch.testing.assert_close(found, expected[:, 8:], rtol=1e-4, atol=1e-5)
    assert cache.layers[0].places is not None and cache.layers[0].places.shape == (2, 2, 6)


@KIND
@POLICY
def test_a_padded_batch_is_each_row_alone(kind: str, policy: str) -> None:
    model, ids = llama(kind=kind), tokens(3, 18)
    mask = left_padded(ids)
    with budgeted_attention(model):
        together = decode(model, ids, 10, BudgetedCache(model.config, [5, 8], policy, sinks=2), mask)
        for row in range(3):
            real = mask[row].bool()
            prompt = 10 - int((~real).sum())
            cache = BudgetedCache(model.config, [5, 8], policy, sinks=2)
            alone = decode(model, ids[row, real][None], prompt, cache)
            torch.testing.assert_close(together[row], alone[0], rtol=1e-4, atol=1e-5)


@POLICY
def test_chunks_after_the_prompt_see_what_is_held(policy: str) -> None:
    model, ids = llama(), tokens(2, 17)
    with budgeted_attention(model), torch.no_grad():
        cache = BudgetedCache(model.config, [6, 9], policy)
        model(input_ids=ids[:, :12], past_key_values=cache)
        held = [layer.places for layer in cache.layers]
        chunk = model(input_ids=ids[:, 12:], past_key_values=cache).logits
        again = BudgetedCache(model.config, [6, 9], policy)
        model(input_ids=ids[:, :12], past_key_values=again)
        assert all(torch.equal(a, b.places) for a, b in zip(held, again.layers, strict=True))
        first = model(input_ids=ids[:, 12:13], past_key_values=again).logits
    torch.testing.assert_close(chunk[:, :1], first, rtol=1e-4, atol=1e-5)
    assert cache.get_seq_length() == 17 and [layer.held for layer in cache.layers] == [6, 9]


def test_bytes_held_really_fall() -> None:
    model, ids = llama(3), tokens(2, 40)
    with budgeted_attention(model), torch.no_grad():
        cache = BudgetedCache(model.config, [7, 5, 12])
        model(input_ids=ids, past_key_values=cache)
        full = DynamicCache(config=model.config)
        model(input_ids=ids, past_key_values=full)
        assert cache.held_bytes() == 2 * (7 + 5 + 12) * 2 * 2 * 8 * 4  # rows, tokens, k and v, heads, width, float32
        assert held_bytes(full) == 2 * 3 * 40 * 2 * 2 * 8 * 4
        model(input_ids=ids[:, :1], past_key_values=cache)
    assert cache.held_bytes() == 2 * 24 * 2 * 2 * 8 * 4 and cache.get_seq_length() == 41
    del full
    gc.collect()
    alive = sum(
        o.untyped_storage().nbytes() for o in gc.get_objects() if isinstance(o, Tensor) and o.shape[-3:] == (2, 40, 8)
    )
    assert alive == 0  # nothing evicted is kept alive by a view


@torch.no_grad()
def test_positions_within_the_cache_are_those_of_the_kept_tokens_alone() -> None:
    model, ids = llama(1), tokens(1, 20)
    with budgeted_attention(model):
        cache = BudgetedCache(model.config, 7, "streaming", sinks=2, positions="cache")
        found = decode(model, ids, 9, cache)
    for t in range(10, 20):  # the first step sees a prompt that was compressed; so do all later ones
        kept = [0, 1, *range(t - 5, t)]
        alone = model(input_ids=ids[:, [*kept, t]]).logits[:, -1]
        torch.testing.assert_close(found[:, t - 8], alone, rtol=1e-4, atol=1e-5)
    with budgeted_attention(model):
        other = decode(model, ids, 9, BudgetedCache(model.config, 7, "streaming", sinks=2))
    assert not torch.allclose(found[:, -1], other[:, -1], atol=1e-4)


@KIND
@POLICY
def test_generate_and_beams(kind: str, policy: str) -> None:
    model, ids = llama(kind=kind), tokens(2, 12)
    mask = left_padded(ids)
    settings = {
        "max_new_tokens": 6,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
        "attention_mask": mask,
    }
    with budgeted_attention(model):
        for beams in (1, 2):
            plain = model.generate(ids, num_beams=beams, **settings)
            wide = BudgetedCache(model.config, 32, policy)
            assert torch.equal(model.generate(ids, past_key_values=wide, num_beams=beams, **settings), plain)
            small = BudgetedCache(model.config, [5, 7], policy)
            assert model.generate(ids, past_key_values=small, num_beams=beams, **settings).shape == plain.shape
            assert [layer.held for layer in small.layers] == [5, 7] and small.get_seq_length() == 17


@POLICY
def test_rows_follow_a_reordering(policy: str) -> None:
    model, ids = llama(), tokens(3, 13)
    with budgeted_attention(model), torch.no_grad():
        caches = [BudgetedCache(model.config, 6, policy) for _ in range(2)]
        order = torch.tensor([2, 0, 2])
        model(input_ids=ids, past_key_values=caches[0])
        caches[0].reorder_cache(order)
        model(input_ids=ids[order], past_key_values=caches[1])
        step = [model(input_ids=ids[order][:, :1], past_key_values=cache).logits for cache in caches]
        torch.testing.assert_close(step[0], step[1], rtol=1e-4, atol=1e-5)
        caches[0].batch_select_indices(torch.tensor([0]))
        caches[0].batch_repeat_interleave(2)
        assert caches[0].layers[0].keys.shape[0] == 2
        caches[0].reset()
        assert caches[0].get_seq_length() == 0 and caches[0].held_bytes() == 0
        assert torch.equal(
            model(input_ids=ids, past_key_values=caches[0]).logits, model(input_ids=ids, use_cache=False).logits
        )


@KIND
@POLICY
@torch.no_grad()
def test_a_pass_without_cache_is_decoding_from_the_first_token(kind: str, policy: str) -> None:
    model, ids = llama(kind=kind), tokens(2, 15)
    budgets = [KVBudget(5, policy, sinks=2), KVBudget(8, policy, sinks=2)]
    budget_cache_(model, dict(zip(cache_owners(model), budgets, strict=True)))
    assert list(cache_budgets(model).values()) == budgets
    whole = model(input_ids=ids, use_cache=False).logits
    cache = DynamicCache(config=model.config)
    torch.testing.assert_close(decode(model, ids, 1, cache), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(decode(model, ids, 1, make_cache(model)), whole, rtol=1e-4, atol=1e-5)
    assert [layer.held for layer in cache.layers] == [5, 8]
    mask = left_padded(ids)
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = model(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False).logits
    alone = model(input_ids=ids[1:, 3:], use_cache=False).logits
    torch.testing.assert_close(padded[1:, 3:], alone, rtol=1e-4, atol=1e-5)
    assert not _RUNNING and model.config._attn_implementation == kind


def test_budgets_travel_with_the_model() -> None:
    model, ids = llama(), tokens(1, 12)
    budget_cache_(model, {"model.layers.1.self_attn": KVBudget(6, "streaming")})
    structure = structure_of(model)
    assert structure == {
        "model.layers.1.self_attn.cache_budget": module_from_spec(next(iter(structure.values()))).spec()
    }
    again = llama()
    rebuild_(again, structure)
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    out = model.generate(ids, return_dict_in_generate=True, **settings)
    assert torch.equal(again.generate(ids, **settings), out.sequences)
    assert [layer.get_seq_length() for layer in out.past_key_values.layers] == [16, 16]
    assert out.past_key_values.layers[1].keys.shape[-2] == 6 and out.past_key_values.layers[0].keys.shape[-2] == 16
    assert "kv 6 streaming" in repr(model)
    assert model.state_dict().keys() == llama().state_dict().keys()  # nothing is stored


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gpt_neox", "mixtral"])
def test_other_models(name: str) -> None:
    model, batches = ZOO[name]()
    model.eval()
    ids = batches[0]["input_ids"]
    budget = {path: KVBudget(5, "window", sinks=1) for path in cache_owners(model)}
    heavy = {path: KVBudget(5, "h2o", sinks=1) for path in cache_owners(model)}
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        for chosen in (budget, heavy):
            budget_cache_(model, chosen)
            whole = model(input_ids=ids, use_cache=False).logits
            found = decode(model, ids, 1, DynamicCache(config=model.config))
            torch.testing.assert_close(found, whole, rtol=1e-3, atol=1e-4)
            assert not torch.allclose(whole, plain, atol=1e-5)


def test_bfloat16() -> None:
    model, ids = llama().to(torch.bfloat16), tokens(1, 14)
    for policy in ("window", "streaming", "h2o"):
        with budgeted_attention(model):
            cache = BudgetedCache(model.config, 6, policy)
            assert decode(model, ids, 10, cache).isfinite().all()
        assert cache.layers[0].keys.dtype == torch.bfloat16
        if policy == "h2o":
            assert cache.layers[0].scores.dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"budgets": [6]}, "budgets: got 1, expected one for each of 2 layers"),
        ({"budgets": [6, 4]}, "budgets: layer 1 got 4 tokens, expected at least 5"),
        ({"budgets": 6, "policy": "snap"}, "policy"),
        ({"budgets": 6, "positions": "none"}, "positions"),
        ({"budgets": 6, "recent_fraction": 2.0}, "recent_fraction"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        BudgetedCache(llama().config, **settings)


def test_what_cannot_be_done_is_refused() -> None:
    model, ids = llama(), tokens(1, 10)
    with pytest.raises(ValueError, match=r"attn_implementation.*budgeted_attention"), torch.no_grad():
        heavy = BudgetedCache(model.config, 6, "h2o")
        model(input_ids=ids, past_key_values=heavy)
        model(input_ids=ids[:, :1], past_key_values=heavy)
    with pytest.raises(RuntimeError, match="budgeted_attention"), torch.no_grad():
        cache = BudgetedCache(model.config, 6)
        model(input_ids=ids, past_key_values=cache)
        model(input_ids=ids[:, :1], past_key_values=cache)
    assert not cache.is_croppable and not cache.is_compileable
    with pytest.raises(RuntimeError, match="cannot be restored"):
        cache.crop(-1)
    with pytest.raises(EvictedError, match="cannot be restored"):
        cache.squeeze(9)
    cache.squeeze(5)
    assert cache.budgets == (5, 5) and [layer.held for layer in cache.layers] == [5, 5]
    assert issubclass(StaticCacheError, NotImplementedError)
    with pytest.raises(NotImplementedError, match="static"), budgeted_attention(model), torch.no_grad():
        model(input_ids=ids, past_key_values=StaticCache(config=model.config, max_cache_len=16))
    assert not _RUNNING
    odd = llama()
    odd.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match=r"attn_implementation.*sdpa"), budgeted_attention(odd), torch.no_grad():
        odd.model.layers[0].self_attn(torch.zeros(1, 1, 32), past_key_values=BudgetedCache(odd.config, 6))
    with pytest.raises(InputError, match="no cache budgets"):
        make_cache(model)
    with pytest.raises(InputError, match="attention module"):
        budget_cache_(model, {"model.layers.0.mlp": KVBudget(8)})


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "gemma3", "t5", "bert"])
def test_models_with_another_cache_are_refused(name: str) -> None:
    model, _ = ZOO[name]()
    with pytest.raises(ValueError, match=r"config|decoder|cache"):
        budget_cache_(model, dict.fromkeys(["x"], KVBudget(6)))
    if name != "bert":
        with pytest.raises(ValueError, match="config"):
            BudgetedCache(model.config, 6)


def test_an_assistant_is_refused() -> None:
    model, ids = llama(), tokens(1, 10)
    with budgeted_attention(model), pytest.raises((RuntimeError, ValueError)):
        model.generate(
            ids,
            past_key_values=BudgetedCache(model.config, 6),
            assistant_model=llama(1),
            max_new_tokens=6,
            eos_token_id=None,
        )


def test_which_slots_stay() -> None:
    real = torch.tensor([[[0, 0, 1, 1, 1, 1, 1, 1]]]).bool()
    assert choose_kept(real, 3, "window").tolist() == [[[5, 6, 7]]]
    assert choose_kept(real, 4, "streaming", sinks=2).tolist() == [[[2, 3, 6, 7]]]
    assert choose_kept(real, 7, "window").tolist() == [[[1, 2, 3, 4, 5, 6, 7]]]  # padding goes first
    scores = torch.tensor([[[9.0, 9, 1, 3, 3, 0, 0, 0]]])
    assert choose_kept(real, 4, "h2o", recent=2, scores=scores).tolist() == [[[3, 4, 6, 7]]]
    assert choose_kept(real, 3, "h2o", recent=2, scores=scores).tolist() == [[[3, 6, 7]]]
    assert choose_kept(real, 9, "window").shape == (1, 1, 8)
    mask = past_mask(torch.ones(1, 6).bool(), 3, "streaming", 1)[0]
    assert mask[5].nonzero().flatten().tolist() == [0, 3, 4, 5]


@pytest.mark.parametrize("tokens", [0, 4, True, 2.5])
def test_treatment_refuses(tokens: Any) -> None:
    with pytest.raises(InputError, match="tokens"):
        KVBudget(tokens)
