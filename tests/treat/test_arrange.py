"""A block that stands in two places runs twice, with a cache of its own, and a saved model does the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from layerwright.core.blocks import find_blocks
from layerwright.core.errors import InputError
from layerwright.core.fingerprint import fingerprint_model
from layerwright.treat.arrange import BlockMap, arrange_blocks
from layerwright.treat.drop import drop_blocks, keep_blocks
from zoo import EXPECTED, ZOO, causal, logits

CHANGES_SHAPE = {"resnet.encoder.stages.1.layers.0", "resnet.encoder.stages.0.layers.0"}
NOT_IN_CONFIG = {"swin", "albert"}
STACKS = [(name, path) for name, stacks in EXPECTED.items() for path in stacks]
REPEATABLE = [(n, p, i) for n, p in STACKS for i in range(EXPECTED[n][p]) if f"{p}.{i}" not in CHANGES_SHAPE]


def twice(depth: int, index: int) -> list[int]:
    return sorted([*range(depth), index])


def run_again(module: nn.Module, path: str) -> Any:
    """The obvious way to run a block twice: call it again on what it gave, without the cache it has filled."""
    from transformers.cache_utils import Cache, EncoderDecoderCache

    kinds = (Cache, EncoderDecoderCache)
    block = module.get_submodule(path)

    def hook(own: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        args = [None if isinstance(value, kinds) else value for value in args]
        kwargs = {key: None if isinstance(value, kinds) else value for key, value in kwargs.items()}
        first = output[0] if isinstance(output, tuple) else output
        if args:
            return own.forward(first, *args[1:], **kwargs)
        name = next(key for key, value in kwargs.items() if isinstance(value, torch.Tensor))
        return own.forward(**{**kwargs, name: first})

    return block.register_forward_hook(hook, with_kwargs=True)


@pytest.mark.filterwarnings("ignore:(Swin|Albert).*right in memory")
@pytest.mark.parametrize(("name", "path", "index"), REPEATABLE)
def test_a_block_in_two_places(name: str, path: str, index: int, tmp_path: object) -> None:
    model, batches = ZOO[name]()
    fingerprint, own = fingerprint_model(model), f"{path}.{index}"
    deeper, block_map = arrange_blocks(model, {path: twice(EXPECTED[name][path], index)})
    after = logits(deeper, batches[0])
    if not (name == "t5" and index == 0):
        handle = run_again(model, own)
        expected = logits(model, batches[0])
        handle.remove()
        assert (after - expected).abs().max() <= 1e-5
    assert fingerprint_model(model) == fingerprint
    assert block_map.copies == {f"{path}.{index + 1}": own}
    assert block_map.new_paths(own + ".x") == (own + ".x", f"{path}.{index + 1}.x")
    size = sum(p.numel() for p in model.get_submodule(own).parameters())
    table = sum(m.weight.numel() for m in model.get_submodule(own).modules() if isinstance(m, nn.Embedding))
    grown = sum(p.numel() for p in deeper.parameters()) - sum(p.numel() for p in model.parameters())
    assert grown == size - (table if name == "t5" else 0)
    deeper.save_pretrained(tmp_path)
    reloaded = type(deeper).from_pretrained(tmp_path).eval()
    if not block_map.notes:
        assert torch.equal(logits(reloaded, batches[0]), after)
    assert bool(block_map.notes) <= (name in NOT_IN_CONFIG)


@pytest.mark.parametrize("name", [*causal(), "bart", "t5", "whisper"])
@pytest.mark.parametrize("share", [False, True])
def test_generation_with_and_without_cache_agree(name: str, share: bool) -> None:
    model, batches = ZOO[name]()
    for stack in find_blocks(model):
        order = [*range(len(stack)), len(stack) - 1]
        order.insert(1, 0)
        deeper, _ = arrange_blocks(model, {stack.path: order}, share=share)
        inputs = {k: batches[0][k] for k in (deeper.main_input_name, "attention_mask") if k in batches[0]}
        limits = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
        cached = deeper.generate(**inputs, **limits, use_cache=True)
        assert torch.equal(cached, deeper.generate(**inputs, **limits, use_cache=False)), stack.path


def test_hidden_states_have_the_new_length_even_if_they_were_asked_for_before() -> None:
    model, batches = ZOO["llama"]()
    ids = batches[0]["input_ids"]
    model(ids, output_hidden_states=True)
    deeper, _ = arrange_blocks(model, [0, 1, 1, 2, 3, 3])
    states = deeper(ids, output_hidden_states=True).hidden_states
    assert len(states) == 7
    assert not torch.equal(states[2], states[3])


def test_shared_copies_train_together_and_are_saved_for_each_place(tmp_path: object) -> None:
    model, batches = ZOO["qwen2"]()
    deeper, _ = arrange_blocks(model, [0, 1, 2, 2, 3], share=True)
    layers = deeper.model.layers
    assert layers[2].mlp.up_proj.weight is layers[3].mlp.up_proj.weight
    assert [layer.self_attn.layer_idx for layer in layers] == [0, 1, 2, 3, 4]
    assert deeper.config.layer_types == [model.config.layer_types[i] for i in (0, 1, 2, 2, 3)]
    apart, _ = arrange_blocks(model, [0, 1, 2, 2, 3])
    assert torch.equal(logits(deeper, batches[0]), logits(apart, batches[0]))
    assert apart.model.layers[2].mlp.up_proj.weight is not apart.model.layers[3].mlp.up_proj.weight
    own = {id(p) for p in model.parameters()}
    assert {id(p) for p in deeper.parameters()} == own


def test_any_order() -> None:
    model, batches = ZOO["llama"]()
    swapped, block_map = arrange_blocks(model, [3, 2, 1, 0])
    back, _ = arrange_blocks(swapped, [3, 2, 1, 0])
    assert block_map.moved["model.layers.3"] == "model.layers.0"
    assert not torch.equal(logits(swapped, batches[0]), logits(model, batches[0]))
    assert torch.equal(logits(back, batches[0]), logits(model, batches[0]))
    mixed, block_map = arrange_blocks(model, [2, 0, 2])
    assert block_map.dropped == ("model.layers.1", "model.layers.3")
    assert block_map.new_paths("model.layers.2.mlp") == ("model.layers.0.mlp", "model.layers.2.mlp")
    assert mixed.config.num_hidden_layers == 3


def test_in_place_and_on_the_meta_device() -> None:
    model, batches = ZOO["gpt2"]()
    expected = logits(arrange_blocks(model, [0, 1, 1, 3])[0], batches[0])
    result, _ = arrange_blocks(model, [0, 1, 1, 3], copy=False)
    assert result is model
    assert torch.equal(logits(model, batches[0]), expected)
    from zoo import on_meta

    meta, _ = arrange_blocks(on_meta("llama"), [0, 0, 1])
    assert meta.config.num_hidden_layers == 3


def test_nothing_to_do() -> None:
    model, _ = ZOO["llama"]()
    result, block_map = arrange_blocks(model, range(4))
    assert (block_map, result is model) == (BlockMap(), False)


@pytest.mark.parametrize("stack", ["encoder.block", "decoder.block"])
def test_t5s_table_moves_to_the_new_first_block(stack: str, tmp_path: object) -> None:
    model, batches = ZOO["t5"]()
    with pytest.raises(InputError, match="move_tables=True"):
        drop_blocks(model, [f"{stack}.0"])
    smaller, _ = drop_blocks(model, [f"{stack}.0"], move_tables=True)
    from layerwright.core.skip import skip_blocks

    with skip_blocks(model, [f"{stack}.0"]):
        expected = logits(model, batches[0])
    after = logits(smaller, batches[0])
    assert torch.allclose(after, expected, atol=1e-6)
    smaller.save_pretrained(tmp_path)
    assert torch.equal(logits(type(smaller).from_pretrained(tmp_path).eval(), batches[0]), after)
    assert not torch.equal(logits(model, batches[0]), expected)


def test_keep_by_role() -> None:
    model, batches = ZOO["bart"]()
    smaller, _ = keep_blocks(model, {"encoder": [0], "decoder": [0, 2]})
    same, _ = drop_blocks(model, ["model.encoder.layers.1", "model.decoder.layers.1"])
    assert torch.equal(logits(smaller, batches[0]), logits(same, batches[0]))


@pytest.mark.parametrize(
    ("name", "order", "message"),
    [
        ("llama", [], "no block is left"),
        ("llama", [0, 4], "got block 4, expected whole numbers from 0 to 3"),
        ("llama", [0, True], "got block True"),
        ("llama", "01", "expected a list of block indices"),
        ("bart", [0, 1], "this model has 2 stacks"),
        ("bart", {"middle": [0]}, "unknown stack 'middle'"),
        ("bart", {"encoder": [0], "model.encoder.layers": [0]}, "mean the same stack"),
        ("resnet", {"resnet.encoder.stages.1.layers": [0, 0, 1, 2]}, "copy: resnet.encoder.stages.1.layers.0 changes"),
    ],
)
def test_refused(name: str, order: Any, message: str) -> None:
    model, _ = ZOO[name]()
    with pytest.raises(InputError, match=message):
        arrange_blocks(model, order)


@pytest.mark.parametrize("keep", [[0, 0], [1, 0], [], [0, 9]])
def test_keep_refuses(keep: list[int]) -> None:
    model, _ = ZOO["bart"]()
    with pytest.raises(InputError, match=r"^keep: (model\.)?encoder"):
        keep_blocks(model, {"encoder": keep})
