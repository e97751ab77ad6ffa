from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from layerwright.core.blocks import find_blocks
from layerwright.core.errors import InputError
from layerwright.core.layers import structure_copy
from layerwright.nn.fake_linear import FakeQuantLinear
from layerwright.nn.replace import module_from_spec
from layerwright.nn.rounded_cache import KeyValueRounding, round_cache_, round_tokens
from zoo import ZOO


def slow_round(x: torch.Tensor, bits: int) -> torch.Tensor:
    top = 2 ** (bits - 1) - 1
    rows = x.double().reshape(-1, x.shape[-1])
    out = [torch.round(row / (row.abs().max() / top)) * (row.abs().max() / top) for row in rows]
    return torch.stack(out).reshape(x.shape)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_token_has_a_scale(bits: int, dtype: torch.dtype) -> None:
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    rounded = round_tokens(x, bits)
    assert rounded.dtype == dtype
    torch.testing.assert_close(rounded.double(), slow_round(x, bits).to(dtype).double(), rtol=1e-2, atol=1e-5)
    if dtype == torch.float32:
        torch.testing.assert_close(rounded.double(), slow_round(x, bits), rtol=1e-5, atol=1e-6)
    assert round_tokens(x[:0], bits).shape == (0, 5, 16)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bloom", "gpt_neox", "gemma2"])
@torch.no_grad()
def test_a_cache_holds_what_a_pass_without_one_sees(name: str) -> None:
    model, batches = ZOO[name]()
    ids = batches[0]["input_ids"]
    model.eval()
    plain = model(input_ids=ids).logits
    rounded = structure_copy(model)
    done = round_cache_(rounded, dict.fromkeys(find_blocks(model)[0].names, 4))
    assert len(done) == len(find_blocks(model)[0])
    without = rounded(input_ids=ids, use_cache=False).logits
    step = rounded(input_ids=ids[:, :-1], use_cache=True)
    last = rounded(input_ids=ids[:, -1:], past_key_values=step.past_key_values, use_cache=True).logits
    torch.testing.assert_close(last[:, 0], without[:, -1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(without, plain, atol=1e-4)
    assert torch.equal(model(input_ids=ids).logits, plain)
    keys = step.past_key_values.layers[0].keys
    torch.testing.assert_close(round_tokens(keys, 4), keys, rtol=1e-5, atol=1e-6)


def test_bits_differ_from_block_to_block_and_16_is_left_alone() -> None:
    model, _ = ZOO["llama"]()
    names = find_blocks(model)[0].names
    done = round_cache_(model, {names[0]: 8, names[1]: 16, names[2]: 2})
    assert done == [f"{names[0]}.self_attn", f"{names[2]}.self_attn"]
    found = {name: m.bits for name, m in model.named_modules() if isinstance(m, KeyValueRounding)}
    assert sorted(found.values()) == [2, 8]
    again = module_from_spec(KeyValueRounding(4).spec())
    assert isinstance(again, KeyValueRounding) and again.bits == 4


def test_gradients_pass_through() -> None:
    model, batches = ZOO["llama"]()
    round_cache_(model, dict.fromkeys(find_blocks(model)[0].names, 4))
    model(input_ids=batches[0]["input_ids"]).logits.sum().backward()
    assert all(float(block.self_attn.k_proj.weight.grad.abs().sum()) > 0 for block in model.model.layers)


def test_what_cannot_be_rounded_is_refused() -> None:
    model, _ = ZOO["llama"]()
    with pytest.raises(InputError, match="no attention module"):
        round_cache_(model, {"model.layers.0.mlp": 4})
    with pytest.raises(InputError, match="bits"):
        round_cache_(model, {"model.layers.0": 9})
    owner = nn.Linear(2, 2)
    KeyValueRounding(4).attach_(owner)
    with pytest.raises(InputError, match="past_key_values"):
        owner(torch.zeros(1, 2))


def test_a_fake_linear_rounds_weight_and_input(tmp_path: Path) -> None:
    linear = nn.Linear(8, 6)
    fake = FakeQuantLinear.from_linear(linear, 4, 8)
    x = torch.randn(3, 8, requires_grad=True)
    expected = nn.functional.linear(round_tokens(x, 8), round_tokens(linear.weight, 4), linear.bias)
    assert torch.equal(fake(x), expected) and fake.weight is linear.weight
    assert torch.equal(FakeQuantLinear.from_linear(linear, 16, 16)(x), linear(x))
    fake(x).sum().backward()
    # Straight through: as if nothing were rounded but the values themselves.
    torch.testing.assert_close(linear.weight.grad, round_tokens(x, 8).detach().sum(0).expand(6, 8))
    with pytest.raises(InputError, match="bits"):
        FakeQuantLinear(4, 4, 9)
    with pytest.raises(InputError, match="linear layer"):
        FakeQuantLinear.from_linear(nn.ReLU())  # type: ignore[arg-type]
