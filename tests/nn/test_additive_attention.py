from __future__ import annotations

from typing import Any

import pytest
import torch

from layerwright.core.errors import InputError
from layerwright.nn.additive_attention import EfficientAdditiveAttention
from layerwright.nn.swiftformer_blocks import ConvEncoder, SwiftFormerEncoder
from oracles.additive_attention import additive_attention


def _layer(dim: int = 6, heads: int = 1, out: int | None = None, **more: Any) -> EfficientAdditiveAttention:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return EfficientAdditiveAttention(dim, heads, out, **more).double()


def _tokens(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize(("heads", "out"), [(1, None), (2, None), (3, 4)])
def test_it_is_the_definition_token_by_token(heads: int, out: int | None) -> None:
    layer, x = _layer(6, heads, out), _tokens(2, 5, 6)
    result, weights = layer(x, return_weights=True)
    expected, shares = additive_attention(layer, x)
    assert result.shape == (2, 5, out or 6) and weights.shape == (2, 5, 1)
    torch.testing.assert_close(result, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(weights, shares)
    torch.testing.assert_close(layer(x), result)
    assert weights.min() < 0 < weights.max(), "lengths, no softmax"


@torch.no_grad()
def test_tokens_may_change_places() -> None:
    layer, x = _layer(), _tokens(2, 9, 6)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order])


@torch.no_grad()
def test_lengths_of_tokens_and_of_the_vector_do_not_matter_but_its_sign_does() -> None:
    layer, x = _layer(), _tokens(2, 7, 6)
    before, shares = layer(x, return_weights=True)
    layer.w_g.mul_(3.7)
    torch.testing.assert_close(layer(x), before)
    layer.w_g.neg_()
    flipped, turned = layer(x, return_weights=True)
    torch.testing.assert_close(turned, -shares)
    query = layer._unit(layer.to_query(x), -1)
    torch.testing.assert_close(turned.transpose(1, 2) @ query, -(shares.transpose(1, 2) @ query))
    assert (flipped - before).abs().max() > 1e-3
    layer.to_query.bias.zero_()
    layer.to_key.bias.zero_()
    torch.testing.assert_close(layer(4.2 * x), layer(x))


@torch.no_grad()
def test_one_token_weighs_one_and_ones_add_up() -> None:
    layer = _layer()
    weights = layer(_tokens(8, 1, 6), return_weights=True)[1]
    torch.testing.assert_close(weights.abs(), torch.ones_like(weights))
    port, x = _layer(query_weights="ones"), _tokens(2, 5, 6)
    query, key = port._unit(port.to_query(x), -1), port._unit(port.to_key(x), -1)
    torch.testing.assert_close(port(x), port.final(port.proj(query.sum(1, keepdim=True) * key) + query))
    assert (port(x) - layer(x)).abs().max() > 1e-3


def test_gradients_agree_with_differences() -> None:
    layer, x = _layer(3, 2), _tokens(1, 4, 3).requires_grad_()
    names = list(dict(layer.named_parameters()))

    def function(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))
        return result

    assert torch.autograd.gradcheck(function, (x, *layer.parameters()))


def test_memory_and_operations_grow_with_the_tokens() -> None:
    layer = _layer(8)
    assert sum(p.numel() for p in layer.parameters()) == 4 * (8 * 8 + 8) + 8
    assert sum(p.numel() for p in _layer(8, 2).parameters()) == 2 * (16 * 8 + 16) + 16 + (16 * 16 + 16) + (8 * 16 + 8)
    largest = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        largest.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(_tokens(1, 500, 8).requires_grad_())
    assert max(largest) == 500 * 8, "no matrix of tokens by tokens"


@torch.no_grad()
@pytest.mark.parametrize(
    "block", [ConvEncoder(8, 32), SwiftFormerEncoder(8), EfficientAdditiveAttention(8)], ids=lambda b: type(b).__name__
)
def test_compiles_whole_and_runs_in_bfloat16(block: Any) -> None:
    x = torch.randn(2, 16, 8) if isinstance(block, EfficientAdditiveAttention) else torch.randn(2, 8, 5, 7)
    block.eval()
    torch.testing.assert_close(torch.compile(block, fullgraph=True, backend="eager")(x), block(x))
    expected = block(x)
    half = block.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, atol=0.06, rtol=0.06)


@torch.no_grad()
def test_half_precision_lengths_are_summed_wide() -> None:
    layer = EfficientAdditiveAttention(4).bfloat16()
    weights = layer(torch.randn(1, 5000, 4).bfloat16(), return_weights=True)[1]
    assert float(weights.double().square().sum()) == pytest.approx(1, abs=0.02)


@torch.no_grad()
def test_blocks_are_residuals_of_scaled_branches() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 8, 6, 5)
    encoder = ConvEncoder(8, 32).eval()
    inner = encoder.pwconv2(torch.nn.functional.gelu(encoder.pwconv1(encoder.norm(encoder.dwconv(x)))))
    torch.testing.assert_close(encoder(x), x + inner)
    block = SwiftFormerEncoder(8).eval()
    local = block.local_representation(x)
    assert (block(x) - local).abs().max() < 1e-3, "attention and MLP start at 1e-5"
    for scale in (block.layer_scale_1, block.layer_scale_2):
        scale.weight.fill_(1)  # type: ignore[union-attr, operator]
    mixed = local + block.attn(local.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(2, 8, 6, 5)
    hidden = torch.nn.functional.gelu(block.fc1(block.norm(mixed)))
    torch.testing.assert_close(block(x), mixed + block.fc2(hidden))
    assert block.fc1.out_channels == 32 and block.local_representation.pwconv1.out_channels == 8


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EfficientAdditiveAttention(0), "dim"),
        (lambda: EfficientAdditiveAttention(4, 0), "num_heads"),
        (lambda: EfficientAdditiveAttention(4, 1, 0), "out_dim"),
        (lambda: EfficientAdditiveAttention(4, query_weights="softmax"), "query_weights"),  # type: ignore[arg-type]
        (lambda: EfficientAdditiveAttention(4)(torch.zeros(2, 4)), "x: got shape"),
        (lambda: EfficientAdditiveAttention(4)(torch.zeros(2, 3, 5)), "x: got shape"),
        (lambda: EfficientAdditiveAttention(4)(torch.zeros(2, 0, 4)), "at least one token"),
        (lambda: EfficientAdditiveAttention(4)(torch.zeros(2, 3, 4), torch.ones(3, 3)), "attention_mask"),
        (lambda: ConvEncoder(4, 0), "hidden_dim"),
        (lambda: SwiftFormerEncoder(4, 0.1), "mlp_ratio"),
    ],
)
def test_bad_input_is_named(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()
    with pytest.raises(TypeError, match="floating-point"):
        EfficientAdditiveAttention(4)(torch.zeros(1, 2, 4, dtype=torch.long))
