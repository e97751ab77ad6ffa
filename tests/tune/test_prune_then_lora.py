"""Prune, adapt, merge: the base weights stay, the adapters are the published ones, and a step really takes less."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerwright.allocate.interleaved import interleaved_keep
from layerwright.core.errors import InputError
from layerwright.treat.drop import drop_blocks, keep_blocks
from layerwright.tune.lora import attach_lora, lora, lora_targets
from layerwright.tune.prune_then_lora import prune_then_lora, step_cost
from zoo import ZOO, logits

KEEP: dict[str, Any] = {"bart": {"encoder": [0], "decoder": [0, 2]}, "t5": {"encoder": [0, 2]}, "llama": [0, 1, 3]}


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", sorted(KEEP))
def test_prune_then_lora(name: str, tmp_path: Any) -> None:
    model, batches = ZOO[name]()
    before = snapshot(model)
    tuned, report = prune_then_lora(model, KEEP[name], batches, steps=4, learning_rate=1e-2, rank=4)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    shorter, _ = keep_blocks(model, KEEP[name])
    assert [n for n, _ in tuned.named_parameters()] == [n for n, _ in shorter.named_parameters()]
    assert (logits(tuned, batches[0]) - logits(shorter, batches[0])).abs().max() > 1e-3
    paths = lora_targets(shorter, "ff")
    expected = sum(4 * sum(_sides(shorter.get_submodule(path))) for path in paths)
    assert report.after.trainable == expected
    assert report.after.saved_bytes < report.before.saved_bytes
    assert report.after.total < report.before.total
    assert report.after.share == expected / report.after.total
    if name == "llama":
        tuned.save_pretrained(tmp_path)
        assert torch.equal(logits(type(tuned).from_pretrained(tmp_path).eval(), batches[0]), logits(tuned, batches[0]))


def _sides(module: nn.Module) -> tuple[int, int]:
    out, in_ = module.weight.shape
    return int(out), int(in_)


@pytest.mark.parametrize("name", ["bart", "t5", "gpt2", "llama", "bert"])
def test_targets_by_group(name: str) -> None:
    model, _ = ZOO[name]()
    ff, attention = set(lora_targets(model, "ff")), set(lora_targets(model, "attention"))
    everything = set(lora_targets(model))
    assert ff and attention and not ff & attention and ff | attention <= everything
    known = {"bart": ("fc1", "fc2"), "t5": ("wi", "wo", "wi_0", "wi_1"), "llama": ("up_proj", "gate_proj", "down_proj")}
    if name in known:
        assert {path.rpartition(".")[2] for path in ff} <= set(known[name])
        assert ff == {path for path in everything if path.endswith(tuple("." + end for end in known[name]))}


def test_adapters_change_nothing_at_first_and_the_base_is_frozen() -> None:
    model, batches = ZOO["bart"]()
    shorter, _ = keep_blocks(model, KEEP["bart"])
    adapted = attach_lora(shorter, rank=4, targets="ff", dropout=0.1)
    assert torch.allclose(logits(adapted.model, batches[0]), logits(shorter, batches[0]), atol=1e-6)
    trained = [name for name, p in adapted.model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    adapted.model(**batches[0]).loss.backward()
    assert all(p.grad is None for name, p in adapted.model.named_parameters() if "lora_" not in name)


def test_biases_of_adapted_layers_may_be_trained_and_the_model_keeps_its_own() -> None:
    model, batches = ZOO["bart"]()
    before = snapshot(model)
    tuned = lora(model, batches, steps=3, learning_rate=1e-2, targets="ff", bias="lora_only")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    moved = {key for key, value in tuned.state_dict().items() if not torch.equal(before[key], value)}
    assert {key.rpartition(".")[2] for key in moved if ".fc1." in key} == {"weight", "bias"}
    assert all(".fc1." in key or ".fc2." in key for key in moved)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dropout": 1.0}, "dropout: got 1.0"),
        ({"dropout": -0.1}, "dropout: got -0.1"),
        ({"rank": 0}, "rank: got 0"),
        ({"bias": "all"}, "unknown bias 'all'"),
        ({"targets": "ffn"}, "unknown layer 'ffn'"),
    ],
)
def test_refused(settings: dict[str, Any], message: str) -> None:
    model, batches = ZOO["llama"]()
    with pytest.raises(InputError, match=message):
        prune_then_lora(model, [0, 1, 2], batches, steps=1, **settings)


def test_a_model_with_adapters_is_not_pruned() -> None:
    model, _ = ZOO["llama"]()
    adapted = attach_lora(model, rank=2)
    with pytest.raises(InputError, match=r"carries an adapter.*merge it first"):
        drop_blocks(adapted.copy, ["model.layers.1"])


def test_nothing_to_measure() -> None:
    model, batches = ZOO["llama"]()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(InputError, match="no trainable parameter"):
        step_cost(model, batches)


def test_published_lists_on_a_deep_model() -> None:
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = {"d_model": 8, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "vocab_size": 16, "max_position_embeddings": 8}
    heads = {"encoder_attention_heads": 1, "decoder_attention_heads": 1}
    model = BartForConditionalGeneration(BartConfig(**sizes, **heads, encoder_layers=12, decoder_layers=12)).eval()
    keep = interleaved_keep(12)
    smaller, _ = keep_blocks(model, {"encoder": keep, "decoder": keep})
    assert (smaller.config.encoder_layers, smaller.config.decoder_layers) == (8, 8)
