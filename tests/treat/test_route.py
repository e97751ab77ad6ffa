"""Tokens that skip feed-forward parts or blocks: equal to the masked dense computation, with and without a cache."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import layerwright as lw
from layerwright.core.class_swap import swapped
from layerwright.core.layers import structure_copy
from layerwright.nn.replace import structure_of
from layerwright.treat.expand import expand_blocks
from layerwright.treat.export import dense_copy
from layerwright.treat.route import DLOHandle, find_routing, route_tokens, routed_blocks
from oracles.routing import dense_routed_llama, packed_block
from zoo import ZOO

ROUTABLE = ("llama", "gpt2", "gpt_neox", "mixtral", "phi3", "qwen2", "falcon", "mistral", "qwen3", "qwen3_moe")


def tiny(name: str = "llama") -> tuple[Any, Tensor]:
    model, batches = ZOO[name]()
    return model.eval(), batches[0]["input_ids"]


def trained(name: str = "llama", seed: int = 0, **settings: Any) -> tuple[DLOHandle, Any, Tensor]:
    """A model with routers that run some tokens and skip others."""
    model, ids = tiny(name)
    handle = route_tokens(model, **settings)
    generator = torch.Generator().manual_seed(seed)
    for routing in handle.routings:
        routing.router.weight.data = torch.randn(routing.router.weight.shape, generator=generator)
    return handle, model, ids


@pytest.mark.parametrize("variant", ["mlp", "block"])
@pytest.mark.parametrize("name", ROUTABLE)
@torch.no_grad()
def test_when_all_tokens_run_nothing_changes(name: str, variant: Any) -> None:
    model, ids = tiny(name)
    before = model(ids, use_cache=False).logits
    if (name, variant) == ("falcon", "block"):  # its blocks return tuples
        with pytest.raises(TypeError, match="use variant='mlp'"):
            route_tokens(model, variant=variant)
        return
    handle = route_tokens(model, variant=variant)
    assert not any(swapped(module) for module in model.modules())
    with handle.learning():
        logits = handle.model(ids, use_cache=False).logits
    assert torch.allclose(logits, before, atol=1e-5)
    assert handle.executed_fraction() == 1
    assert handle.last_similarity is not None
    assert handle.last_similarity.shape == (len(handle.blocks), *ids.shape)
    assert float(handle.last_similarity.abs().max()) <= 1 + 1e-5


@pytest.mark.parametrize("gap", [0.0, 0.05, 1.0])
@torch.no_grad()
def test_evaluation_is_the_masked_dense_computation(gap: float) -> None:
    handle, model, ids = trained(gap=gap, scale=1.5)
    weights = [routing.router.weight for routing in handle.routings]
    logits = handle.model(ids).logits
    assert torch.allclose(logits, dense_routed_llama(model, ids, weights, None, 1.5, gap), atol=2e-6)
    assert handle.last_mask is not None
    assert handle.last_scores is not None
    assert torch.equal(handle.last_mask, handle.last_scores > 0.5)
    assert 0.1 < handle.executed_fraction() < 0.9
    assert handle.executed_fraction() == pytest.approx(float(handle.last_mask.double().mean()))
    assert handle.last_similarity is None


@pytest.mark.parametrize("capacity", [0.01, 0.3, 0.75, 1.0, 1.3])
def test_learning_runs_the_largest_scores_of_the_batch(capacity: float) -> None:
    handle, model, ids = trained()
    handle.capacity = [capacity] * 4
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    with handle.learning():
        handle.model(ids, attention_mask=mask)
    assert handle.last is not None
    for call in handle.last:
        kept = max(1, min(19, -(-19 * round(capacity * 100) // 100)))
        flat = call.scores[mask.bool()]
        assert int(call.mask.sum()) == kept
        assert not call.mask[~mask.bool()].any()
        assert bool((flat.sort(descending=True).values[:kept].min() <= call.scores[call.mask]).all())
    del model


@torch.no_grad()
def test_learning_is_the_masked_dense_computation_and_knows_the_similarities() -> None:
    handle, model, ids = trained(gap=0.5)
    handle.capacity = [0.2, 0.5, 0.8, 1.0]
    with handle.learning():
        logits = handle.model(ids).logits
    assert handle.last is not None
    weights = [routing.router.weight for routing in handle.routings]
    masks = [call.mask for call in handle.last]
    assert torch.allclose(logits, dense_routed_llama(model, ids, weights, masks, 2.0, 0.5), atol=2e-6)
    block = model.model.layers[0]  # its input does not depend on any choice
    hidden = model.model.embed_tokens(ids)
    rotary = model.model.rotary_emb(hidden, torch.arange(ids.shape[1])[None])
    seen = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()[None, None]
    attended = hidden + block.self_attn(block.input_layernorm(hidden), rotary, attention_mask=seen)[0]
    whole = attended + block.mlp(block.post_attention_layernorm(attended))
    expected = nn.functional.cosine_similarity(attended, whole, dim=-1)
    similarity = handle.last[0].similarity
    assert similarity is not None
    assert torch.allclose(similarity, expected, atol=1e-5)


@pytest.mark.parametrize("wanted", ["none", "all", "some"])
@torch.no_grad()
def test_skipped_tokens_are_not_computed(wanted: str) -> None:
    handle, _, ids = trained()
    if wanted != "some":
        for routing in handle.routings:
            routing.router.register_forward_hook(lambda _m, _a, out: torch.full_like(out, float(wanted == "all")))
    seen: list[int] = []
    for block in handle.blocks:
        down = handle.model.get_submodule(f"{block}.mlp.down_proj")
        down.register_forward_hook(lambda _m, args, _o: seen.append(args[0].shape[:-1].numel()))
    handle.model(ids)
    assert handle.last_mask is not None
    run = [int(mask.sum()) for mask in handle.last_mask]
    assert seen == [count for count in run if count]
    assert sum(run) == {"none": 0, "all": 4 * ids.numel(), "some": sum(run)}[wanted]


def greedy(model: Any, ids: Tensor, use_cache: bool, **extra: Any) -> Tensor:
    result: Tensor = model.generate(
        ids, max_new_tokens=8, do_sample=False, use_cache=use_cache, pad_token_id=0, eos_token_id=None, **extra
    )
    return result


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
@torch.no_grad()
def test_a_cache_changes_nothing(name: str) -> None:
    handle, _, ids = trained(name)
    model: Any = handle.model
    whole = model(ids, use_cache=False).logits
    cache, parts = None, []
    for start, end in ((0, 5), (5, 6), (6, 7), (7, 10), (10, 12)):
        step = model(ids[:, start:end], past_key_values=cache, use_cache=True)
        cache, parts = step.past_key_values, [*parts, step.logits]
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-5)
    assert torch.equal(greedy(model, ids, True), greedy(model, ids, False))


@torch.no_grad()
def test_left_padding_changes_nothing() -> None:
    handle, _, ids = trained()
    model: Any = handle.model
    short = ids[:1, 4:]
    padded = torch.cat([torch.zeros(1, 4, dtype=ids.dtype), short], 1)
    both = torch.cat([padded, ids[1:]])
    mask = torch.ones_like(both)
    mask[0, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(both, attention_mask=mask, position_ids=positions).logits
    assert torch.allclose(logits[0, 4:], model(short).logits[0], atol=1e-5)
    assert torch.allclose(logits[1], model(ids[1:]).logits[0], atol=1e-5)
    counts = handle.routings[0].counts
    assert counts is not None
    assert int(counts[1]) == 20 + 8 + 12
    handle.reset()
    assert math.isnan(handle.executed_fraction())


def test_the_loss_reaches_the_router_through_the_factor_alone() -> None:
    for gap in (0.0, 0.05):
        handle, _, ids = trained(gap=gap)
        handle.capacity = [0.5] * 4
        with handle.learning():
            handle.model(input_ids=ids, labels=ids).loss.backward()
        gradients = [routing.router.weight.grad for routing in handle.routings]
        assert all(g is not None for g in gradients)
        found = [float(g.abs().max()) for g in gradients if g is not None]
        assert all(value == 0 for value in found) if gap == 0 else all(value > 0 for value in found)


@torch.no_grad()
def test_variant_block_attends_among_kept_tokens_at_their_own_positions() -> None:
    handle, model, ids = trained(variant="block", gap=0.5, blocks=[1])
    model_inner: Any = model.model
    for sample in range(2):
        logits = handle.model(ids[sample : sample + 1]).logits
        hidden = model_inner.embed_tokens(ids[sample : sample + 1])
        for number, block in enumerate(model_inner.layers):
            score = torch.sigmoid(hidden @ handle.routings[0].router.weight)[0]
            routed = number == 1
            kept = [t for t in range(12) if not routed or score[t] > 0.5]
            factor = 1 + (score - 0.5) * 0.5 if routed else torch.ones(12)
            hidden = packed_block(block, model_inner.rotary_emb, hidden, kept, factor)
        assert torch.allclose(logits, model.lm_head(model_inner.norm(hidden)), atol=2e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_variant_block_in_a_batch_is_that_of_single_samples(attention: str) -> None:
    handle, _, ids = trained(variant="block")
    model: Any = handle.model
    model.set_attn_implementation(attention)
    with torch.no_grad():
        mask = torch.ones_like(ids)
        mask[0, 8:] = 0
        logits = model(ids, attention_mask=mask).logits
        assert torch.allclose(logits[0, :8], model(ids[:1, :8]).logits[0], atol=1e-5)
        assert torch.allclose(logits[1], model(ids[1:]).logits[0], atol=1e-5)
    handle.capacity = [0.3] * 4
    with handle.learning():
        model(ids, attention_mask=mask, labels=ids).loss.backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)
    assert handle.last_similarity is not None
    assert bool(torch.isfinite(handle.last_similarity[:, mask.bool()]).all())


@torch.no_grad()
def test_variant_block_when_no_token_runs() -> None:
    model, ids = tiny()
    handle = route_tokens(model, variant="block")
    expected = model.lm_head(model.model.norm(model.model.embed_tokens(ids)))
    assert torch.allclose(handle.model(ids).logits, expected, atol=1e-6)


def test_variant_block_has_no_cache() -> None:
    handle, model, ids = trained(variant="block")
    routed: Any = handle.model
    assert routed.config.use_cache is False
    assert model.config.use_cache is True
    with pytest.raises(ValueError, match="use_cache"):
        routed(ids, use_cache=True)
    assert greedy(routed, ids, False).shape == (2, 20)
    assert handle.remove().config.use_cache is True  # type: ignore[union-attr]


@torch.no_grad()
def test_removal_restores_everything() -> None:
    model, ids = tiny()
    names = list(model.state_dict())
    handle, before = route_tokens(model, copy=False), type(tiny()[0].model.layers[0])
    assert handle.model is model
    assert swapped(model.model.layers[0])
    assert isinstance(model.model.layers[0], before)
    removed = handle.remove()
    assert removed is model
    assert list(model.state_dict()) == names
    assert all(type(block) is before for block in model.model.layers)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert torch.equal(model(ids).logits, tiny()[0](ids).logits)
    assert find_routing(model) is None
    route_tokens(model, copy=False)


@torch.no_grad()
def test_hidden_states_and_copies() -> None:
    handle, _, ids = trained()
    model: Any = handle.model
    output = model(ids, output_hidden_states=True)
    assert len(output.hidden_states) == 5
    for other in (copy.deepcopy(model), structure_copy(model)):
        assert torch.equal(other(ids).logits, output.logits)
        found = find_routing(other)
        assert found is not None
        assert found.tokens is not handle.tokens
        with found.learning():
            assert not handle.tokens.learning
            other(ids, attention_mask=torch.ones_like(ids))
        assert found.last_similarity is not None
        assert handle.last_similarity is None
        found.remove()
        assert torch.equal(model(ids).logits, output.logits)


@pytest.mark.parametrize("variant", ["mlp", "block"])
def test_copies_after_a_call_with_gradients(variant: Any) -> None:
    handle, _, ids = trained(variant=variant)
    with handle.learning():
        handle.model(ids)
    assert find_routing(copy.deepcopy(handle.model)) is not None


@pytest.mark.parametrize("variant", ["mlp", "block"])
@torch.no_grad()
def test_save_and_load(tmp_path: Path, variant: Any) -> None:
    model, ids = tiny()
    deeper, block_map = expand_blocks(model, 2)
    handle = route_tokens(deeper, list(block_map.copies), variant=variant, gap=0.2)
    generator = torch.Generator().manual_seed(0)
    for routing in handle.routings:
        routing.router.weight.data = torch.randn(32, generator=generator)
        routing.capacity = 0.7
    for path in handle.blocks:  # so that the new blocks do something
        handle.model.get_parameter(f"{path}.mlp.down_proj.weight").normal_(generator=generator)
    assert set(structure_of(handle.model)) == {f"{path}.token_routing" for path in handle.blocks}
    lw.save(handle.model, tmp_path / "out")
    again, _ = lw.load(tmp_path / "out")
    assert torch.equal(again(ids).logits, handle.model(ids).logits)
    assert not torch.allclose(again(ids).logits, deeper(ids).logits, atol=1e-3)
    found = find_routing(again)
    assert found is not None
    assert found.blocks == handle.blocks
    assert found.capacity.tolist() == [0.7, 0.7]
    if variant == "mlp":
        assert torch.equal(greedy(again, ids, True), greedy(again, ids, False))
        assert torch.equal(greedy(again, ids, True), greedy(handle.model, ids, True))
    found.remove()
    assert torch.equal(again(ids).logits, handle.remove()(ids).logits)


@torch.no_grad()
def test_a_dense_copy_runs_everything() -> None:
    handle, model, ids = trained()
    assert torch.equal(dense_copy(handle.model)(ids).logits, model(ids).logits)
    assert find_routing(handle.model) is not None


@torch.no_grad()
def test_half_precision() -> None:
    handle, _, ids = trained()
    model = handle.model.to(torch.bfloat16)
    with handle.learning():
        logits = model(ids).logits
    assert logits.dtype == torch.bfloat16
    assert handle.last_scores is not None
    assert handle.last_scores.dtype == torch.float32


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    found = []
    for checkpointing in (False, True):
        handle, _, ids = trained()
        handle.capacity = [0.4] * 4
        model: Any = handle.model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        output = model(input_ids=ids, labels=ids, use_cache=False)
        scores = handle.last_scores
        assert scores is not None
        (output.loss + scores.square().mean()).backward()
        found.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))


def test_which_blocks() -> None:
    names = [f"b{i}" for i in range(10)]
    assert routed_blocks(names) == tuple(names)
    assert routed_blocks(names, ["b4", "b9"], every=0) == ("b4", "b9")
    assert routed_blocks(names, ["b4", "b9"], every=2, route_new=False) == ("b1", "b3", "b6", "b8")
    assert routed_blocks(names, ["b4", "b9"], spare=2) == ("b2", "b3", "b4", "b5", "b6", "b9")
    with pytest.raises(ValueError, match="leave no block"):
        routed_blocks(names, spare=5)
    with pytest.raises(ValueError, match="every, spare"):
        routed_blocks(names, every=-1)
    model, _ = tiny()
    paths = [f"model.layers.{i}" for i in range(4)]
    assert route_tokens(model, [2, 0]).blocks == (paths[0], paths[2])
    assert route_tokens(model, [paths[3]]).blocks == (paths[3],)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gap": -0.1}, "gap"),
        ({"variant": "attention"}, "variant"),
        ({"blocks": []}, "blocks"),
        ({"blocks": ["model.layers.9"]}, "model.layers"),
        ({"blocks": [4]}, "unknown block"),
    ],
)
def test_bad_settings(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        route_tokens(tiny()[0], **settings)


def test_one_router_for_a_block() -> None:
    handle, _, _ = trained(blocks=[1])
    with pytest.raises(ValueError, match="one router"):
        route_tokens(handle.model)


@pytest.mark.parametrize("name", ["opt", "gemma2", "bloom", "bert"])
def test_blocks_whose_feed_forward_part_is_not_added_last(name: str) -> None:
    with pytest.raises(TypeError, match="model:"):
        route_tokens(tiny(name)[0])


def test_models_without_blocks_or_of_another_kind() -> None:
    with pytest.raises(TypeError, match="model:"):
        route_tokens(nn.Linear(3, 3))
    vision, batches = ZOO["vit"]()
    with pytest.raises(ValueError, match="sample"):
        route_tokens(vision)
    with pytest.raises(ValueError, match="decoders"):
        route_tokens(vision, variant="block", sample=batches[0])
    handle = route_tokens(vision, sample=batches[0])
    with handle.learning(), torch.no_grad():
        assert torch.allclose(handle.model(**batches[0]).logits, vision(**batches[0]).logits, atol=1e-6)


def test_capacities_that_do_not_fit() -> None:
    handle, _, _ = trained()
    with pytest.raises(ValueError, match="capacity"):
        handle.capacity = [0.5, 0.5]
    with pytest.raises(ValueError, match="capacity"):
        handle.capacity = [0.5, 0.5, -1, 0.5]
