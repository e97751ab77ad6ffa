from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from layerwright.core.errors import InputError
from layerwright.core.storage import stored_bytes
from layerwright.core.treatment import Quantize, RoundActivations
from layerwright.nn import module_from_spec, structure_of
from layerwright.nn.activation import ActivationQuantizer, InputQuantizer
from layerwright.nn.packing import pack, unpack
from layerwright.nn.quantized import QuantLinear
from layerwright.nn.replace import rebuild_
from layerwright.nn.w4a8 import W4A8Linear, integer_layers_
from stored_samples import normal, quantized, relative, state_bytes


def linear(in_: int = 96, out: int = 24, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(in_, out).to(dtype).requires_grad_(False)


@pytest.mark.parametrize("scale", [None, 0.02])
@pytest.mark.parametrize("group", [-1, 8, 32])
@pytest.mark.parametrize("tokens", [0, 1, 5, 33])
def test_integer_path_is_the_float64_reference(tokens: int, group: int, scale: float | None) -> None:
    module = W4A8Linear.from_linear(linear(), group_size=group, input_scale=scale)
    assert module.act == ("dynamic" if scale is None else "static")
    x = normal(2, tokens, 96, seed=1)
    y, expected = module(x), module.reference(x)
    assert y.shape == (2, tokens, 24)
    if tokens:
        assert relative(y, expected) < 1e-5
        assert relative(y, linear()(x)) < 0.2


@pytest.mark.parametrize("tokens", [1, 32, 33])
@pytest.mark.parametrize("scale", [None, 0.03])
def test_bfloat16(tokens: int, scale: float | None) -> None:
    module = W4A8Linear.from_linear(linear(dtype=torch.bfloat16), group_size=32, input_scale=scale)
    x = normal(tokens, 96, seed=1).bfloat16()
    y = module(x)
    assert y.dtype == torch.bfloat16 and relative(y, module.reference(x)) < 1.5e-2


def test_codes_are_packed_nibbles() -> None:
    module = W4A8Linear.from_linear(linear(), group_size=32)
    codes = module.codes(0, 0, 24)
    assert int(codes.min()) >= -8 and int(codes.max()) <= 7
    assert torch.equal(unpack(pack(codes, 4), 4, 96), codes) and torch.equal(
        pack(codes, 4), module.get_buffer("weight_packed")
    )
    treatments = (Quantize(4, 32, method="rtn"), RoundActivations(8, symmetric=True))
    static = W4A8Linear.from_linear(linear(), group_size=32, input_scale=0.1)
    assert state_bytes(static) == stored_bytes(treatments, 24, 96, 1, 4) + 24 * 4


def test_tokens_do_not_touch_each_other() -> None:
    module = W4A8Linear.from_linear(linear(), group_size=32)
    x = normal(9, 96, seed=1)
    x[3] *= 1000
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(module(x[order]), module(x)[order])
    torch.testing.assert_close(module(x[5:6]), module(x)[5:6], rtol=1e-6, atol=1e-6)


class Conv1D(nn.Module):
    """GPT-2's layer: its weight is ``(in, out)``."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(plain.weight.t().clone()), plain.bias


def test_transposed_weights() -> None:
    x = normal(3, 96)
    a, b = (W4A8Linear.from_linear(m, group_size=32) for m in (linear(), Conv1D(linear())))
    assert torch.equal(a(x), b(x))


@pytest.mark.parametrize("share", ["tensor", "token"])
def test_one_layer_of_two_parts(share: Any) -> None:
    quantizer = ActivationQuantizer(8, "uniform", share, symmetric=True)
    if share == "tensor":
        quantizer.set_(torch.tensor([0.03]))
    stored = quantized((1, 24, 96), 4, 32, symmetric=False)
    model = nn.Sequential(nn.Linear(96, 96), QuantLinear.from_stored(stored, normal(24), torch.float32))
    InputQuantizer(quantizer).attach_(model[1])
    x = normal(7, 96, seed=2)
    before = model(x)
    assert integer_layers_(model) == ["1"]
    assert isinstance(model[1], W4A8Linear) and list(structure_of(model)) == ["1"]
    assert relative(model(x), before) < 1e-5
    other = nn.Sequential(nn.Linear(96, 96), nn.Linear(96, 24))
    rebuild_(other, json.loads(json.dumps(structure_of(model))))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    assert integer_layers_(model) == []


def test_other_activations_stay() -> None:
    stored = quantized((1, 24, 96), 4, 32)
    model = nn.Sequential(QuantLinear.from_stored(stored, None, torch.float32))
    InputQuantizer(ActivationQuantizer(4, "uniform", "token", symmetric=True)).attach_(model[0])
    assert integer_layers_(model) == [] and isinstance(model[0], QuantLinear)
    child = model[0].get_submodule("input_quantizer")
    assert isinstance(child, InputQuantizer)
    with pytest.raises(InputError, match="symmetric 8-bit activations"):
        W4A8Linear.from_parts(model[0], child)


def test_the_range_stays_exact_in_other_dtypes_and_gradients_pass() -> None:
    module = W4A8Linear.from_linear(linear(), group_size=32, input_scale=0.0301)
    module.to(torch.bfloat16)
    assert module.input_scale is not None and module.input_scale.dtype == torch.float32
    assert float(module.input_scale) == pytest.approx(0.0301)
    module = W4A8Linear.from_linear(linear(), group_size=32, input_scale=0.01)
    x = torch.cat([normal(1, 48) * 0.1, torch.full((1, 48), 5.0)], 1).requires_grad_()
    module(x).sum().backward()
    assert x.grad is not None
    expected = module.dequantize().sum(0)
    torch.testing.assert_close(x.grad[0, :48], expected[:48], rtol=1e-4, atol=1e-5)
    assert float(x.grad[0, 48:].abs().max()) == 0  # clamped
    again = module_from_spec(json.loads(json.dumps(module.spec())))
    again.load_state_dict(module.state_dict())
    assert torch.equal(again(x), module(x))


def test_what_is_refused() -> None:
    with pytest.raises(InputError, match="q_proj: group_size 40 does not divide its 96 inputs"):
        W4A8Linear.from_linear(linear(), group_size=40, name="q_proj")
    done = W4A8Linear.from_linear(linear(), group_size=32)
    for module in (done, nn.ReLU(), QuantLinear.from_stored(quantized((1, 8, 32)), None, torch.float32)):
        with pytest.raises(TypeError, match=r"expected an nn\.Linear that is not quantized yet"):
            W4A8Linear.from_linear(module)
    settings: dict[str, Any] = {"act": "sometimes", "bias": False}
    with pytest.raises(InputError, match="act: got 'sometimes'"):
        W4A8Linear(32, 8, Quantize(4, 32), torch.float32, **settings)
