from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import layerwright as lw
from layerwright.core.attention_heads import attention_heads
from layerwright.core.layers import structure_copy
from layerwright.nn.pruned_heads import PrunedHeads
from layerwright.nn.resized import ResizedLinear
from layerwright.treat.encoder_exits import add_encoder_exits
from layerwright.treat.prune_heads import best_units, encoder_widths, prune_heads_, prune_neurons_
from zoo import ZOO

ENCODERS = ["bert", "roberta", "distilbert", "vit", "deit"]


def logits(model: Any, batch: dict[str, Any]) -> Tensor:
    found: Tensor = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    return found.detach()


def without_heads(model: nn.Module, gone: dict[str, list[int]]) -> None:
    """Zero the columns of the output projection that belong to the heads `gone` of each block."""
    for path, part in attention_heads(model).items():
        layer: Any = model.get_submodule(part.o.path)
        for head in gone[path]:
            layer.weight.data[:, head * part.head_size : (head + 1) * part.head_size] = 0


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ENCODERS)
def test_heads_that_say_nothing_can_go(name: str, attention: str) -> None:
    model, batches = ZOO[name]()
    model.set_attn_implementation(attention)  # type: ignore[operator]
    if "attention_mask" in batches[0]:
        batches[0]["attention_mask"][1, 7:] = 0
    paths = list(attention_heads(model))
    gone = {path: [[0], [1, 2], [0, 2, 3]][number % 3] for number, path in enumerate(paths)}
    without_heads(model, gone)
    before = logits(model, batches[0])
    small = structure_copy(model)
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    for path in paths:
        part = attention_heads(small)[path]
        kept = torch.tensor([head for head in range(4) if head not in gone[path]])
        now = prune_heads_(small, part, kept)
        assert now.heads == len(kept)
        assert now.q.shape == now.k.shape == now.v.shape == (8 * len(kept), 32)
        assert now.o.shape == (32, 8 * len(kept))
        assert attention_heads(small)[path] == now
    assert torch.allclose(logits(small, batches[0]), before, atol=1e-5)
    assert {key: value.shape for key, value in model.state_dict().items()} == shapes
    assert torch.equal(logits(model, batches[0]), before)


@pytest.mark.parametrize("name", ENCODERS)
def test_neurons_that_say_nothing_can_go(name: str) -> None:
    model, batches = ZOO[name]()
    parts = encoder_widths(model)[1]
    kept = torch.tensor([0, 3, 4, 17, 40, 63])
    for part in parts.values():
        layer: Any = model.get_submodule(part.down.path)
        layer.weight.data[:, [n for n in range(64) if n not in kept.tolist()]] = 0
    before = logits(model, batches[0])
    for path in parts:
        now = prune_neurons_(model, encoder_widths(model)[1][path], kept)
        assert now.neurons == 6
        assert [ref.shape for ref in now.layers] == [(32, 6), (6, 32)]
    assert torch.allclose(logits(model, batches[0]), before, atol=1e-5)


def test_rows_and_columns_keep_their_order() -> None:
    model, _ = ZOO["bert"]()
    path, part = next(iter(attention_heads(model).items()))
    old: dict[str, Any] = {role: model.get_submodule(getattr(part, role).path) for role in "qkvo"}
    prune_heads_(model, part, torch.tensor([1, 3]))
    rows = [*range(8, 16), *range(24, 32)]
    now = attention_heads(model)[path]
    for role in "qkv":
        layer: Any = model.get_submodule(getattr(now, role).path)
        assert isinstance(layer, ResizedLinear)
        assert torch.equal(layer.weight, old[role].weight[rows])
        assert torch.equal(layer.bias, old[role].bias[rows])
    output: Any = model.get_submodule(now.o.path)
    assert torch.equal(output.weight, old["o"].weight[:, rows])
    assert torch.equal(output.bias, old["o"].bias)
    attention: Any = model.get_submodule(now.owner)
    assert (attention.num_attention_heads, attention.all_head_size, attention.attention_head_size) == (2, 16, 8)
    assert output.weight.data_ptr() != old["o"].weight.data_ptr()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ENCODERS)
def test_saved_and_loaded_with_unequal_widths(name: str, attention: str, tmp_path: Path) -> None:
    model, batches = ZOO[name]()
    model = add_encoder_exits(model).model
    for number, path in enumerate(attention_heads(model)):
        prune_heads_(model, attention_heads(model)[path], torch.arange(number + 1))
        prune_neurons_(model, encoder_widths(model)[1][path], torch.arange(10 + number))
    lw.save(model, tmp_path / "out")
    loaded: Any = lw.load(tmp_path / "out")[0]
    for network in (model, loaded):
        network.set_attn_implementation(attention)  # type: ignore[operator]
    assert torch.equal(logits(loaded, batches[0]), logits(model, batches[0]))
    parts = attention_heads(loaded)
    assert [part.heads for part in parts.values()] == [1, 2, 3]
    for part in parts.values():
        owner = loaded.get_submodule(part.owner)
        sizes = [getattr(owner, key) for key in ("num_attention_heads", "n_heads") if hasattr(owner, key)]
        assert sizes == [part.heads]


def test_heads_can_be_removed_twice_and_frozen_ones_stay_frozen() -> None:
    model, batches = ZOO["bert"]()
    model.requires_grad_(False)
    path = next(iter(attention_heads(model)))
    once = structure_copy(model)
    prune_heads_(once, attention_heads(once)[path], torch.tensor([1, 3]))
    twice = structure_copy(model)
    prune_heads_(twice, attention_heads(twice)[path], torch.tensor([0, 1, 3]))
    prune_heads_(twice, attention_heads(twice)[path], torch.tensor([1, 2]))
    assert torch.equal(logits(once, batches[0]), logits(twice, batches[0]))
    assert not any(parameter.requires_grad for parameter in twice.parameters())
    owner = twice.get_submodule(attention_heads(twice)[path].owner)
    assert [type(child) for child in owner.children()].count(PrunedHeads) == 1
    assert logits(twice.bfloat16(), batches[0]).dtype == torch.bfloat16


def test_best_units_keep_their_order_and_the_first_of_equals() -> None:
    scores = torch.tensor([0.5, 2.0, 1.0, 2.0, 0.1])
    assert best_units(scores, 3).tolist() == [1, 2, 3]
    assert best_units(torch.ones(4), 2).tolist() == [0, 1]
    assert best_units(scores, 5).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("count", [0, 6, -1])
def test_bad_counts(count: int) -> None:
    with pytest.raises(ValueError, match="heads: got"):
        best_units(torch.ones(5), count, "heads")


@pytest.mark.parametrize("kept", [[], [4], [-1, 0], [2, 1], [1, 1]])
def test_bad_heads_and_neurons(kept: list[int]) -> None:
    model, _ = ZOO["bert"]()
    part = next(iter(attention_heads(model).values()))
    with pytest.raises(ValueError, match="heads: got"):
        prune_heads_(model, part, torch.tensor(kept, dtype=torch.long))
    with pytest.raises(ValueError, match="kept: got"):
        prune_neurons_(model, next(iter(encoder_widths(model)[1].values())), torch.tensor([64, *kept]))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_fused_and_shared_projections_are_left_alone(name: str) -> None:
    model, _ = ZOO[name]()
    assert attention_heads(model) == {}
    with pytest.raises(TypeError, match="model"):
        encoder_widths(model)
