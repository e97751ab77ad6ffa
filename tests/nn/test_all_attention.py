"""The all-attention layer and its learned spans: against a loop over keys, by their identities, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from layerwright.core.errors import InputError
from layerwright.nn.adaptive_span import AdaptiveSpan
from layerwright.nn.all_attention import (
    AllAttention,
    PersistentMemory,
    RelativePositions,
    attend_to_vectors,
    rotate,
    skew,
    unskew,
)
from oracles.all_attention import all_attention

DIM, HEADS, VECTORS, SPAN = 8, 2, 3, 5


def made(num_vectors: int = VECTORS, seed: int = 0, **settings: Any) -> AllAttention:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AllAttention(DIM, HEADS, num_vectors, **({"max_span": SPAN} | settings)).eval()


def drawn(tokens: int, seed: int = 1, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, tokens, DIM, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tokens", [1, 4, 9])
@pytest.mark.parametrize("earlier", [0, 2, 7])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"include_self": True},
        {"mask_empty": False, "bias": True},
        {"mask_empty": False, "include_self": True},
        {"adaptive_span": True, "ramp": 2, "init_span": 0.5},
        {"adaptive_span": True, "ramp": 1, "include_self": True, "mask_empty": False},
        {"position": "none"},
        {"position": "none", "max_span": None, "fused": False},
        {"position": "none", "max_span": None, "include_self": True},
        {"position": "rope"},
        {"position": "rope", "fused": False, "mask_empty": False},
        {"position": "rope", "adaptive_span": True, "ramp": 3, "init_span": 0.2},
        {"rescale": False},
    ],
)
def test_it_is_the_loop_over_keys(settings: dict[str, Any], earlier: int, tokens: int) -> None:
    layer = made(**settings)
    x, memory = drawn(tokens), drawn(earlier, 2) if earlier else None
    assert torch.allclose(layer(x, memory).double(), all_attention(layer, x, memory), atol=2e-6)


@pytest.mark.parametrize(
    "settings", [{"position": "rope"}, {"position": "none"}, {"position": "none", "max_span": None}]
)
@pytest.mark.parametrize("include_self", [False, True])
def test_the_fused_path_is_the_slow_one(settings: dict[str, Any], include_self: bool) -> None:
    fast = made(include_self=include_self, **settings)
    slow = made(include_self=include_self, fused=False, **settings)
    slow.load_state_dict(fast.state_dict())
    assert fast.fused
    x, memory = drawn(9), drawn(3, 4)
    for given in (None, memory):
        assert torch.allclose(fast(x, given), slow(x, given), atol=1e-6)
    for layer in (fast, slow):
        layer(x, memory).square().sum().backward()
    for (name, a), b in zip(fast.named_parameters(), slow.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-4), name


def test_without_vectors_it_is_plain_attention() -> None:
    layer = made(0, position="rope", include_self=True, max_span=None, fused=False)
    x = drawn(6)
    split = [p(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj)]
    places = torch.arange(6)
    q, k, v = rotate(split[0], places), rotate(split[1], places), split[2]
    plain = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    assert torch.allclose(layer(x), layer.o_proj(plain), atol=1e-6)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("mask_empty", [False, True])
def test_all_weights_sum_to_one(adaptive: bool, mask_empty: bool) -> None:
    layer = made(adaptive_span=adaptive, mask_empty=mask_empty, ramp=2, init_span=0.3 if adaptive else 0.0)
    context, persistent = layer.weights(drawn(7), drawn(2, 5))
    assert context.shape == (2, HEADS, 7, SPAN)
    assert persistent.shape == (2, HEADS, 7, VECTORS)
    assert torch.allclose(context.sum(-1) + persistent.sum(-1), torch.ones(2, HEADS, 7), atol=1e-6)
    mass = layer.attention_mass(drawn(7), drawn(2, 5))
    assert torch.allclose(mass, persistent.sum(-1).mean((0, 2)), atol=1e-6)
    assert bool(((mass > 0) & (mass < 1)).all())


@pytest.mark.parametrize("ramp", [1, 4])
def test_a_full_span_is_full_attention(ramp: int) -> None:
    layer, whole = made(adaptive_span=True, ramp=ramp, init_span=1.0), made()
    whole.load_state_dict({key: value for key, value in layer.state_dict().items() if key != "span.z"})
    assert torch.allclose(layer(drawn(9)), whole(drawn(9)), atol=1e-6)


def test_skew_there_and_back_and_against_a_loop() -> None:
    by_key = torch.randn(2, 3, 4, 9)
    by_distance = unskew(by_key)
    assert by_distance.shape == (2, 3, 4, 6)
    for i in range(4):
        for j in range(6):
            assert torch.equal(by_distance[..., i, j], by_key[..., i, i + j])
    assert torch.equal(unskew(skew(by_distance)), by_distance)
    assert skew(by_distance).sum().item() == pytest.approx(by_distance.sum().item(), abs=1e-4)


@pytest.mark.parametrize("settings", [{}, {"mask_empty": False}, {"position": "rope"}, {"include_self": True}])
@pytest.mark.parametrize("z", [None, 0.4])
def test_block_by_block_is_one_run(settings: dict[str, Any], z: float | None) -> None:
    span = {} if z is None else {"adaptive_span": True, "ramp": 2, "init_span": z}
    layer, x = made(**settings, **span), drawn(11)
    memory, parts = None, []
    for block in x.split(3, 1):
        parts.append(layer(block, memory))
        memory = block if memory is None else torch.cat([memory, block], 1)[:, -SPAN:]
    assert torch.allclose(torch.cat(parts, 1), layer(x), atol=1e-6)


@pytest.mark.parametrize("position", ["relative", "rope", "none"])
def test_a_token_changes_nothing_before_it_and_itself_only_as_a_query(position: str) -> None:
    layer, x, place = made(position=position), drawn(8), 4
    other = x.clone()
    other[:, place] += 1
    before, after = layer(x), layer(other)
    assert torch.equal(before[:, :place], after[:, :place])
    assert not torch.allclose(before[:, place + 1], after[:, place + 1])
    with torch.no_grad():
        layer.q_proj.weight.zero_()  # scores of zero: a query that is always the same
    assert torch.allclose(layer(x)[:, place], layer(other)[:, place], atol=1e-7)
    assert not torch.allclose(layer(x)[:, place + 1], layer(other)[:, place + 1])


def test_a_feed_forward_part_is_attention_to_vectors_without_normalisation() -> None:
    first, second = nn.Linear(DIM, 20, bias=False), nn.Linear(20, DIM, bias=False)
    x = drawn(5)
    assert torch.allclose(
        attend_to_vectors(x, first.weight, second.weight.T, "relu"), second(first(x).relu()), atol=1e-6
    )
    assert not torch.allclose(attend_to_vectors(x, first.weight, second.weight.T, "softmax"), second(first(x).relu()))


def test_gradient_of_the_span_by_finite_difference() -> None:
    layer = made(adaptive_span=True, ramp=4, init_span=0.37).double()
    x = drawn(6).double()

    def out(z: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, {"span.z": z}, (x,)).square().sum()

    z = layer.span.z.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(out, (z,), eps=1e-6, atol=1e-6)
    out(z).backward()
    assert bool(z.grad.any())


def test_spans() -> None:
    span = AdaptiveSpan(2, 1000, ramp=32, init=0.0)
    assert span.mask(40)[..., -1].tolist() == [[1.0], [1.0]]
    assert span.current_max() == 0
    assert span.kept() == 1000 - (1000 - 32) // 64 * 64
    assert span.penalty().item() == 0
    with torch.no_grad():
        span.z.copy_(torch.tensor([0.5, 1.7]).view(2, 1, 1))
    span.clamp_()
    assert span.z.flatten().tolist() == [0.5, 1.0]
    assert span.current_max() == 1000
    assert span.kept() == 1000
    assert span.penalty().item() == 750
    assert torch.equal(span.mask(1000)[1, 0], torch.ones(1000))
    assert span.mask(1000)[0, 0, : 1000 - 533].max() == 0


def test_keys_beyond_every_span_are_not_computed_and_the_output_stays() -> None:
    layer = made(max_span=200, adaptive_span=True, ramp=8, init_span=0.1)
    assert layer.kept() == 200 - (200 - 28) // 64 * 64
    x = drawn(150, batch=1)
    context, _ = layer.weights(x)
    assert context.shape[-1] == layer.kept()
    assert torch.allclose(layer(x).double(), all_attention(layer, x), atol=2e-6)


def test_persistent_vectors_have_unit_variance_in_use_and_larger_gradients_as_stored() -> None:
    memory = PersistentMemory(4, 16, 400, generator=torch.Generator().manual_seed(0))
    keys, values = memory()
    assert keys.var().item() == pytest.approx(1, rel=0.05)
    assert values.var().item() == pytest.approx(1, rel=0.05)
    assert memory.keys.var().item() == pytest.approx(1 / 16, rel=0.05)
    assert memory.values.var().item() == pytest.approx(1 / 400, rel=0.05)
    (keys.sum() + values.sum()).backward()
    assert memory.keys.grad[0, 0, 0] == 4
    assert memory.values.grad[0, 0, 0] == 20
    plain = PersistentMemory(4, 16, 400, rescale=False)
    assert plain.values.var().item() == pytest.approx(1, rel=0.05)


def test_a_table_is_shared_and_dropout_acts_in_training_alone() -> None:
    table = RelativePositions(DIM // HEADS, SPAN)
    first, second = made(relative=table), made(relative=table, dropout=0.5)
    assert first.relative is second.relative
    x = drawn(4)
    assert torch.equal(second(x), second(x))
    assert not torch.equal(second.train()(x), second(x))


@pytest.mark.parametrize("settings", [{}, {"adaptive_span": True}, {"position": "rope"}])
def test_half_precision(settings: dict[str, Any]) -> None:
    layer = made(**settings)
    x = drawn(9)
    out = made(**settings).to(torch.bfloat16)(x.to(torch.bfloat16))
    assert out.dtype == torch.bfloat16
    assert torch.allclose(out.float(), layer(x), atol=0.05)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_heads": 3}, "num_heads: got 3"),
        ({"num_vectors": -1}, "num_vectors: got -1"),
        ({"adaptive_span": True, "ramp": 0}, "ramp: got 0"),
        ({"adaptive_span": True, "init_span": 1.5}, "init: got 1.5"),
        ({"max_span": 0}, "max_span: got 0"),
        ({"max_span": None}, "max_span: got None"),
        ({"max_span": None, "position": "none", "adaptive_span": True}, "max_span: got None"),
        ({"adaptive_span": True, "position": "none", "fused": True}, "fused: .* adaptive_span"),
        ({"fused": True}, "fused: .* position='relative'"),
        ({"position": "absolute"}, "unknown position 'absolute'"),
        ({"num_heads": 8, "position": "rope"}, "even width"),
        ({"relative": RelativePositions(4, 7)}, r"relative: got a table of \(4, 7\)"),
        ({"dropout": 1.0}, "dropout: got 1.0"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    given = {"num_heads": HEADS, "num_vectors": VECTORS, "max_span": SPAN} | settings
    with pytest.raises(InputError, match=message):
        AllAttention(DIM, given.pop("num_heads"), given.pop("num_vectors"), **given)


def test_wrong_inputs() -> None:
    layer = made()
    with pytest.raises(InputError, match="memory: got shape"):
        layer(drawn(3), drawn(3, batch=1))
    with pytest.raises(InputError, match="memory: got shape"):
        layer(drawn(3), torch.zeros(2, 3, DIM + 1))
    alone = made(0)
    for tokens in (3, SPAN + 4):
        with pytest.raises(InputError, match="include_self=True, or num_vectors"):
            alone(drawn(tokens))
    assert torch.isfinite(alone(drawn(3), drawn(1, 2))).all()
    assert torch.isfinite(made(0, mask_empty=False)(drawn(3))).all()
    assert torch.isfinite(made(0, include_self=True)(drawn(3))).all()
