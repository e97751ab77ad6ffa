from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerwright.core.errors import InputError
from layerwright.nn.additive_attention import EfficientAdditiveAttention
from layerwright.treat.swap_attention import SwappedAttention, swap_attention


class _Net(nn.Module):
    """A block around `nn.MultiheadAttention`, called in one of several ways."""

    def __init__(self, batch_first: bool = True, how: str = "plain") -> None:
        super().__init__()
        self.attention, self.how = nn.MultiheadAttention(8, 2, batch_first=batch_first), how
        self.idle = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.shape[1] if self.attention.batch_first else x.shape[0]
        more: dict[str, Any] = {}
        if self.how == "mask":
            more = {"attn_mask": torch.ones(tokens, tokens).triu(1).bool()}
        if self.how == "padding":
            more = {"key_padding_mask": torch.zeros(x.shape[:2], dtype=torch.bool)}
        if self.how == "cross":
            return x + self.attention(x, x.flip(1), x.flip(1))[0]
        return x + self.attention(x, x, x, **more)[0]


def _batch() -> list[Tensor]:
    return [torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))]


@torch.no_grad()
@pytest.mark.parametrize("batch_first", [True, False])
def test_a_multihead_attention_is_replaced_and_the_model_stays(batch_first: bool) -> None:
    model, data = _Net(batch_first).eval(), _batch()
    before = model(data[0])
    swapped = swap_attention(model, "attention", data)
    layer = swapped.attention
    assert isinstance(layer, SwappedAttention) and isinstance(layer.layer, EfficientAdditiveAttention)
    torch.testing.assert_close(model(data[0]), before)
    x = data[0]
    mixed = layer.layer(x) if batch_first else layer.layer(x.transpose(0, 1)).transpose(0, 1)
    torch.testing.assert_close(swapped(x), x + mixed)
    assert not layer.training
    again = swap_attention(model, ["attention"], data, lambda dim: EfficientAdditiveAttention(dim, 2), copy=False)
    assert again is model and model.attention.layer.num_heads == 2  # type: ignore[union-attr]


@torch.no_grad()
def test_a_vision_transformer_of_transformers_runs_on_and_trains() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=4
    )
    model = transformers.ViTForImageClassification(config).eval()
    data = [{"pixel_values": torch.randn(2, 3, 16, 16)}]
    names = [name for name, module in model.named_modules() if type(module).__name__ == "ViTAttention"]
    assert len(names) == 2
    swapped = swap_attention(model, names, data)
    assert sum(isinstance(module, EfficientAdditiveAttention) for module in swapped.modules()) == 2
    with torch.enable_grad():
        swapped(**data[0]).logits.sum().backward()
    inner = swapped.get_submodule(names[0]).layer
    assert all(p.grad is not None for p in inner.parameters())  # type: ignore[union-attr]
    half = swap_attention(model.bfloat16(), names, [{"pixel_values": torch.randn(2, 3, 16, 16).bfloat16()}])
    assert half.get_submodule(names[0]).layer.w_g.dtype == torch.bfloat16  # type: ignore[union-attr]


@torch.no_grad()
def test_an_encoder_layer_of_torch_does_not_go_past_it() -> None:
    encoder, data = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), _batch()
    swapped = swap_attention(encoder, "self_attn", data)
    x = data[0]
    middle = encoder.norm1(x + swapped.self_attn.layer(x))  # type: ignore[union-attr, operator]
    expected = encoder.norm2(middle + encoder.linear2(encoder.linear1(middle).relu()))
    torch.testing.assert_close(swapped(x), expected)
    assert swapped.train()(x).shape == x.shape


@pytest.mark.parametrize(
    ("how", "message"), [("mask", "attn_mask"), ("padding", "key_padding_mask"), ("cross", "another sequence")]
)
def test_masks_and_other_sequences_are_refused(how: str, message: str) -> None:
    with pytest.raises(InputError, match=f"attention: .*{message}"):
        swap_attention(_Net(how=how), "attention", _batch())
    later = swap_attention(_Net(), "attention", _batch())
    later.how = how  # type: ignore[assignment]
    with pytest.raises(InputError, match=message):
        later(_batch()[0])


def test_a_causal_decoder_is_refused() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=32,
        num_key_value_heads=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    with pytest.raises(InputError, match=r"mask|causal"):
        swap_attention(model, "model.layers.0.self_attn", [{"input_ids": torch.arange(6)[None]}])


def test_bad_names_are_named() -> None:
    with pytest.raises(InputError, match="did you mean attention"):
        swap_attention(_Net(), "attentions", _batch())
    with pytest.raises(InputError, match="idle does not run"):
        swap_attention(_Net(), "idle", _batch())
    with pytest.raises(InputError, match="expected \\(batch, tokens, dim\\)"):
        swap_attention(nn.Sequential(nn.Linear(8, 4)), "0", _batch())
