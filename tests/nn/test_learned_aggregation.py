from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from layerwright.core.errors import InputError
from layerwright.nn.learned_aggregation import ClassAttentionHead, LearnedAggregation
from layerwright.nn.patch_conv_block import PatchConvBlock


def _unsettle_(module: torch.nn.Module) -> Any:
    """Large weights, so that no part is negligible."""
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype))
    return module


def _layer(dim: int = 6, heads: int = 1, **more: Any) -> LearnedAggregation:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer: LearnedAggregation = _unsettle_(LearnedAggregation(dim, heads, **more).double())
    return layer


def _head(dim: int = 6, classes: int = 4, **more: Any) -> ClassAttentionHead:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head: ClassAttentionHead = _unsettle_(ClassAttentionHead(dim, classes, **more).double())
    return head


def _features(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def _by_definition(layer: LearnedAggregation, x: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and weights of positions ``(N, dim)``, one query, head and position after the other."""
    own = layer.state_dict()

    def linear(name: str, row: Tensor) -> Tensor:
        return own[f"{name}.weight"] @ row + own[f"{name}.bias"]

    def norm(name: str, row: Tensor) -> Tensor:
        centred = row - row.mean()
        return centred / math.sqrt(float((centred**2).mean()) + 1e-6) * own[f"{name}.weight"] + own[f"{name}.bias"]

    queries = list(own["queries"][0])
    read = [norm("norm1", row) for row in (*queries, *x)] if layer.keys_include_query else [norm("norm1", r) for r in x]
    width = layer.dim // layer.num_heads
    tokens, maps = [], []
    for query in queries:
        asked = linear("q_proj", norm("norm1", query))
        gathered, shares = torch.zeros(layer.dim, dtype=torch.float64), []
        for head in range(layer.num_heads):
            part = slice(head * width, (head + 1) * width)
            scores = [math.exp(float(asked[part] @ linear("k_proj", row)[part]) / math.sqrt(width)) for row in read]
            for score, row in zip(scores, read, strict=True):
                gathered[part] += score / sum(scores) * linear("v_proj", row)[part]
            shares.append([score / sum(scores) for score in scores[len(read) - len(x) :]])
        token = query + own["layer_scale_1"] * linear("o_proj", gathered)
        hidden = functional.gelu(linear("fc1", norm("norm2", token)))
        tokens.append(token + own["layer_scale_2"] * linear("fc2", hidden))
        maps.append(torch.tensor(shares, dtype=torch.float64))
    return torch.stack(tokens), torch.stack(maps, 1)


@torch.no_grad()
@pytest.mark.parametrize(("heads", "queries", "included"), [(1, 1, True), (2, 1, True), (3, 4, False), (2, 3, True)])
def test_it_is_the_definition_position_by_position(heads: int, queries: int, included: bool) -> None:
    layer, x = _layer(6, heads, num_queries=queries, keys_include_query=included), _features(2, 5, 6)
    tokens, weights = layer(x, return_attention=True)
    assert tokens.shape == (2, queries, 6) and weights.shape == (2, heads, queries, 5)
    for sample in range(2):
        expected, shares = _by_definition(layer, x[sample])
        torch.testing.assert_close(tokens[sample], expected, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(weights[sample], shares, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(layer(x), tokens)
    torch.testing.assert_close(layer.attention(x), weights)
    total = weights.sum(-1)
    assert (total < 0.999).all() if included else torch.allclose(total, torch.ones_like(total))


@torch.no_grad()
def test_without_a_query_all_positions_and_the_token_itself_count_the_same() -> None:
    layer, x = _layer(), _features(3, 7, 6)
    layer.q_proj.weight.zero_()
    layer.q_proj.bias.zero_()
    tokens, weights = layer(x, return_attention=True)
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 8))
    layer.layer_scale_2.zero_()
    values = layer.v_proj(layer.norm1(torch.cat([layer.queries.expand(3, -1, -1), x], 1)))
    expected = layer.queries + layer.layer_scale_1 * layer.o_proj(values.mean(1, keepdim=True))
    torch.testing.assert_close(layer(x), expected)
    assert (tokens - expected).abs().max() > 1e-3, "the hidden layer counts too"


@torch.no_grad()
def test_positions_stay_as_they_are_and_may_change_places() -> None:
    head, x = _head(num_heads=2), _features(2, 9, 6)
    before = x.clone()
    logits, weights = head(x, return_attention=True)
    assert torch.equal(x, before)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(2))
    again, permuted = head(x[:, order], return_attention=True)
    torch.testing.assert_close(again, logits)
    torch.testing.assert_close(permuted, weights[..., order])
    torch.testing.assert_close(head(x.transpose(1, 2).reshape(2, 6, 3, 3)), logits)
    moved = x.clone()
    moved[:, 4, 2] += 1
    assert (head(moved) - logits).abs().max() > 1e-3


@torch.no_grad()
def test_one_class_with_a_query_of_its_own_is_a_single_query_that_does_not_read_itself() -> None:
    own, x = _head(classes=1, per_class=True), _features(2, 5, 6)
    single = ClassAttentionHead(6, 1).double()
    single.load_state_dict(own.state_dict())
    assert (single(x) - own(x)).abs().max() > 1e-3
    single.aggregation.keys_include_query = False
    torch.testing.assert_close(single(x), own(x))


@torch.no_grad()
def test_each_class_reads_its_own_token() -> None:
    head, x = _head(classes=3, per_class=True), _features(2, 4, 6)
    logits, weights = head(x, return_attention=True)
    tokens = head.norm(head.aggregation(x))
    rows = [tokens[:, k] @ head.fc.weight[k] + head.fc.bias[k] for k in range(3)]
    torch.testing.assert_close(logits, torch.stack(rows, 1))
    assert weights.shape == (2, 1, 3, 4)
    kept = head.aggregation.q_proj.weight.clone()
    head.aggregation.queries[:, 1, 0] += 1
    changed = (head(x) - logits).abs().amax(0)
    assert changed[1] > 1e-3 and changed[0] < 1e-12 and changed[2] < 1e-12
    head.reset_classifier_(5)
    assert head(x).shape == (2, 5) and head.aggregation.num_queries == 5 and head.fc.weight.dtype == torch.float64
    assert torch.equal(head.aggregation.q_proj.weight, kept)


@torch.no_grad()
def test_other_widths_are_brought_to_that_of_the_aggregation() -> None:
    head, x = _head(dim=6, in_features=10, num_heads=3), _features(2, 10, 3, 4)
    logits, weights = head(x, return_attention=True)
    assert isinstance(head.proj, torch.nn.Linear)
    narrow = functional.conv2d(x, head.proj.weight[:, :, None, None], head.proj.bias)
    torch.testing.assert_close(logits, head.fc(head.norm(head.aggregation(narrow))[:, 0]))
    assert weights.shape == (2, 3, 1, 12)
    torch.testing.assert_close(head(x.flatten(2).transpose(1, 2)), logits)
    with pytest.raises(InputError, match="10 channels"):
        head(_features(2, 6, 3, 4))


def test_gradients_agree_with_differences() -> None:
    head, x = _head(4, 2, num_heads=2), _features(1, 3, 4).requires_grad_()
    names = list(dict(head.named_parameters()))

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(head, dict(zip(names, parameters, strict=True)), (x,))
        return result

    assert torch.autograd.gradcheck(function, (x, *head.parameters()))


def test_starts_and_counts_are_the_published_ones() -> None:
    layer = LearnedAggregation(64)
    assert sum(p.numel() for p in layer.parameters()) == 4 * (64**2 + 64) + 2 * 3 * 64**2 + 4 * 64 + 7 * 64
    for linear in (layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj, layer.fc1, layer.fc2):
        assert float(linear.weight.detach().std()) == pytest.approx(0.02, rel=0.1) and not linear.bias.any()
    assert float(layer.queries.detach().std()) == pytest.approx(0.02, rel=0.35)
    assert torch.equal(layer.layer_scale_1, torch.full((64,), 1e-4)) and torch.equal(
        layer.layer_scale_1, layer.layer_scale_2
    )
    assert layer.norm1.eps == 1e-6
    assert LearnedAggregation(8, qkv_bias=False).k_proj.bias is None
    block = PatchConvBlock(64)
    assert sum(p.numel() for p in block.parameters()) == 2 * (64**2 + 64) + 10 * 64 + 2 * 16 * 64 + 16 + 64 + 3 * 64
    assert torch.equal(block.layer_scale, torch.full((64,), 1e-6))


@torch.no_grad()
def test_dropped_samples_keep_their_query_and_evaluation_drops_nothing() -> None:
    layer, x = _layer(drop_path=0.5), _features(64, 3, 6)
    torch.testing.assert_close(layer.eval()(x), layer(x))
    torch.testing.assert_close(_layer()(x), layer(x))
    tokens = layer.train()(x)
    kept = (tokens != layer.queries).flatten(1).any(1)
    assert 0.5 < float(kept.double().mean()) < 1, "three samples of four lose at most one of two branches"


@torch.no_grad()
def test_a_block_is_a_residual_of_its_parts() -> None:
    torch.manual_seed(0)
    block, x = _unsettle_(PatchConvBlock(8)).eval(), torch.randn(2, 8, 5, 7)
    normed = functional.layer_norm(x.movedim(1, -1), (8,), block.norm.weight, block.norm.bias, 1e-6).movedim(-1, 1)
    inner = functional.gelu(functional.conv2d(normed, block.pwconv1.weight, block.pwconv1.bias))
    inner = functional.gelu(functional.conv2d(inner, block.dwconv.weight, block.dwconv.bias, padding=1, groups=8))
    means = inner.mean((2, 3))
    squeeze = block.squeeze
    assert squeeze.reduce.out_channels == 2
    hidden = (means @ squeeze.reduce.weight[:, :, 0, 0].T + squeeze.reduce.bias).relu()
    weights = (hidden @ squeeze.expand.weight[:, :, 0, 0].T + squeeze.expand.bias).sigmoid()
    inner = functional.conv2d(inner * weights[:, :, None, None], block.pwconv2.weight, block.pwconv2.bias)
    torch.testing.assert_close(block(x), x + block.layer_scale[:, None, None] * inner)
    assert (block(x) - x).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize(
    "make",
    [lambda: ClassAttentionHead(8, 3), lambda: ClassAttentionHead(8, 3, per_class=True), lambda: PatchConvBlock(8)],
    ids=["single", "per class", "block"],
)
def test_compiles_whole_and_runs_in_bfloat16(make: Any) -> None:
    torch.manual_seed(0)
    module, x = _unsettle_(make()).eval(), torch.randn(2, 8, 3, 5)
    expected = module(x)
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="eager")(x), expected)
    half = module.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, atol=0.1, rtol=0.1)


def test_weights_are_not_made_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = _layer()

    def refuse(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(layer, "_weights", refuse)
    assert layer(_features(1, 4, 6)).shape == (1, 1, 6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LearnedAggregation(0), "dim"),
        (lambda: LearnedAggregation(6, 4), "num_heads: got 4 for 6"),
        (lambda: LearnedAggregation(6, 0), "num_heads"),
        (lambda: LearnedAggregation(6, num_queries=0), "num_queries"),
        (lambda: LearnedAggregation(6, mlp_ratio=0.1), "mlp_ratio"),
        (lambda: LearnedAggregation(6, drop_path=1.0), "drop_path"),
        (lambda: ClassAttentionHead(6, 0), "num_classes"),
        (lambda: ClassAttentionHead(6, 0, per_class=True), "num_classes"),
        (lambda: ClassAttentionHead(6, 2, in_features=0), "in_features"),
        (lambda: ClassAttentionHead(6, 2).reset_classifier_(0), "num_classes"),
        (lambda: LearnedAggregation(6)(torch.zeros(1, 5, 2, 2)), r"\(1, 5, 2, 2\).*6 channels"),
        (lambda: LearnedAggregation(6)(torch.zeros(1, 6)), "x: got shape"),
        (lambda: LearnedAggregation(6)(torch.zeros(1, 0, 6)), "at least one position"),
        (lambda: PatchConvBlock(0), "dim"),
        (lambda: PatchConvBlock(4, drop_path=-0.1), "drop_path"),
    ],
)
def test_bad_input_is_named(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_whole_numbers_are_refused() -> None:
    for module in (LearnedAggregation(4), ClassAttentionHead(4, 2), ClassAttentionHead(4, 2, in_features=3)):
        with pytest.raises(TypeError, match="floating-point"):
            module(torch.zeros(1, 2, 4, dtype=torch.long))
