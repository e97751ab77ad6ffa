from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from layerwright.core.errors import InputError
from layerwright.nn._attention_kinds import feature_attention, orthogonal_gaussian, performer_features
from layerwright.nn.wide_attention import CAUSAL_KINDS, AttentionKind, WideAttention

KINDS = get_args(AttentionKind)
SETTINGS: dict[str, Any] = {"max_len": 16, "rank": 5, "window": 3, "features": 12}


def tokens(batch: int = 2, length: int = 11, dim: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(batch, length, dim, generator=torch.Generator().manual_seed(seed))


def layer(kind: AttentionKind, causal: bool = False, **settings: Any) -> WideAttention:
    return WideAttention(6, 4, 5, kind, causal, **(SETTINGS | settings))


def oracle(attention: WideAttention, x: Tensor, seen: Tensor) -> Tensor:
    """Softmax attention of one sequence by loops over heads and queries, in float64; `seen` is (queries, keys)."""
    x, out = x.double(), torch.zeros(x.shape, dtype=torch.float64)
    w = {name: getattr(attention, f"{name}_proj").weight.double() for name in "qkvo"}
    for head in range(attention.num_heads):
        rows = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
        q, k, v = (x @ w[name][rows].T for name in "qkv")
        for i in range(len(x)):
            places = seen[i].nonzero()[:, 0]
            if len(places):
                weights = (k[places] @ q[i] / math.sqrt(attention.head_dim)).softmax(0)
                out[i] += w["o"][:, rows] @ (weights @ v[places])
    return out.float()


@pytest.mark.parametrize("bias", [False, True])
def test_equals_torch_where_the_inner_width_is_the_width(bias: bool) -> None:
    attention = WideAttention(12, 3, 4, bias=bias)
    peer = nn.MultiheadAttention(12, 3, bias=bias, batch_first=True)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    with torch.no_grad():
        peer.in_proj_weight.copy_(torch.cat([p.weight for p in projections]))
        peer.out_proj.weight.copy_(attention.o_proj.weight)
        if bias:
            peer.in_proj_bias.copy_(torch.cat([p.bias for p in projections]))
            peer.out_proj.bias.copy_(attention.o_proj.bias)
    x, keep = tokens(dim=12), torch.ones(2, 11, dtype=torch.bool)
    keep[1, 7:] = False
    torch.testing.assert_close(attention(x), peer(x, x, x)[0])
    masked = peer(x, x, x, key_padding_mask=~keep)[0]
    torch.testing.assert_close(attention(x, keep)[keep], masked[keep])


@pytest.mark.parametrize("causal", [False, True])
def test_softmax_against_loops(causal: bool) -> None:
    attention, x = layer("softmax", causal), tokens()
    seen = torch.ones(11, 11, dtype=torch.bool)
    seen = seen.tril() if causal else seen
    keep = torch.ones(2, 11, dtype=torch.bool)
    keep[0, :3], keep[1, 7:] = False, False  # padding on the left: the first causal queries have no key
    out, masked = attention(x), attention(x, keep)
    for row in range(2):
        torch.testing.assert_close(out[row], oracle(attention, x[row], seen), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(masked[row], oracle(attention, x[row], seen & keep[row]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_heads_add_up(kind: AttentionKind) -> None:
    attention, x = layer(kind), tokens()
    torch.testing.assert_close(attention.head_outputs(x).sum(1), attention(x))
    torch.testing.assert_close(layer(kind, bias=True).head_outputs(x).shape, (2, 4, 11, 6))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_mix_the_values(kind: AttentionKind) -> None:
    attention, x = layer(kind), tokens()
    weights = attention.weights(x)
    values = attention._split(attention.v_proj(x))
    torch.testing.assert_close(attention.o_proj((weights @ values).transpose(1, 2).flatten(2)), attention(x))
    if kind != "linformer":
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 11))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("window", "length"), [(1, 9), (3, 11), (3, 12), (5, 23), (9, 10), (21, 11)])
def test_local_against_loops(window: int, length: int, causal: bool) -> None:
    attention, x = layer("local", causal, window=window), tokens(length=length)
    gap = torch.arange(length)[None, :] - torch.arange(length)[:, None]
    near = (gap > -window) & (gap <= 0) if causal else gap.abs() <= window // 2
    keep = torch.ones(2, length, dtype=torch.bool)
    keep[1, length // 2 :] = False
    out, masked = attention(x), attention(x, keep)
    for row in range(2):
        torch.testing.assert_close(out[row], oracle(attention, x[row], near), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(masked[row], oracle(attention, x[row], near & keep[row]), atol=1e-5, rtol=1e-4)


def test_local_with_a_window_over_everything_is_softmax() -> None:
    x = tokens()
    for causal, window in ((False, 21), (True, 11)):
        local = layer("local", causal, window=window)
        full = layer("softmax", causal)
        full.load_state_dict(local.state_dict())
        torch.testing.assert_close(local(x), full(x))
    narrower = layer("local", window=19)
    assert not torch.allclose(narrower(x), layer("softmax")(x), atol=1e-4)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [11, 150])
def test_linear_is_its_quadratic_form(length: int, causal: bool) -> None:
    attention, x = layer("linear", causal), tokens(length=length)
    q, k = (nn.functional.elu(attention._split(p(x))) + 1 for p in (attention.q_proj, attention.k_proj))
    scores = q @ k.transpose(-1, -2)
    scores = scores.tril() if causal else scores
    torch.testing.assert_close(attention.weights(x), scores / scores.sum(-1, keepdim=True), atol=1e-6, rtol=1e-4)


def test_performer_is_its_quadratic_form_and_estimates_softmax() -> None:
    attention, x = layer("performer", features=4096), 0.5 * tokens()
    q, k = attention._split(attention.q_proj(x)), attention._split(attention.k_proj(x))
    scaled = [y.double() / attention.head_dim**0.25 for y in (q, k)]
    phi = [(y @ attention.projection.double().T - y.square().sum(-1, keepdim=True) / 2).exp() / 64 for y in scaled]
    scores = phi[0] @ phi[1].transpose(-1, -2)
    exact = scaled[0] @ scaled[1].transpose(-1, -2)
    torch.testing.assert_close(
        attention.weights(x).double(), scores / scores.sum(-1, keepdim=True), atol=1e-6, rtol=1e-4
    )
    torch.testing.assert_close(scores, exact.exp(), rtol=0.1, atol=0)


def test_performer_error_falls_with_the_root_of_the_features() -> None:
    generator = torch.Generator().manual_seed(1)
    # The variance grows as exp(|q + k|^2): with long vectors the rate shows only with far more features.
    q, k, v = (torch.randn(1, 1, 24, 8, generator=generator) * scale for scale in (0.5, 0.5, 1.0))
    exact = (q @ k.transpose(-1, -2) / math.sqrt(8)).softmax(-1) @ v
    sizes, errors = (16, 64, 256, 1024), []
    for size in sizes:
        squares = []
        for _ in range(40):
            w = orthogonal_gaussian(size, 8, generator)
            out = feature_attention(performer_features(q, w, False), performer_features(k, w, True), v, None, False)
            squares.append((out - exact).square().mean())
        errors.append(float(torch.stack(squares).mean().sqrt()))
    logs = torch.tensor([sizes, errors]).log()
    centred = logs - logs.mean(1, keepdim=True)
    slope = float((centred[0] * centred[1]).sum() / centred[0].square().sum())
    assert -0.6 < slope < -0.4, errors


def test_orthogonal_rows_are_as_long_as_gaussian_ones() -> None:
    w = orthogonal_gaussian(4000, 4, torch.Generator().manual_seed(0))
    products = w[:4] @ w[:4].T
    torch.testing.assert_close(products, products.diag().diag(), atol=1e-5, rtol=0)
    assert abs(float(w.square().sum(1).mean()) - 4) < 0.15
    assert orthogonal_gaussian(7, 4).shape == (7, 4)


def test_linformer_with_identities_is_softmax() -> None:
    linformer, x = layer("linformer", rank=11, max_len=11), tokens()
    with torch.no_grad():
        linformer.key_rows.copy_(torch.eye(11))
        linformer.value_rows.copy_(torch.eye(11))
    full = layer("softmax")
    full.load_state_dict(linformer.state_dict(), strict=False)
    torch.testing.assert_close(linformer(x), full(x))


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(kind: AttentionKind) -> None:
    attention, x = layer(kind), tokens(length=8)
    longer = torch.cat([x, 9 * tokens(length=5, seed=3)], 1)
    keep = (torch.arange(13) < 8).expand(2, -1)
    torch.testing.assert_close(attention(longer, keep)[:, :8], attention(x), atol=1e-5, rtol=1e-4)
    keep = keep.clone()
    keep[1] = False
    out = attention(longer, keep)
    assert out.isfinite().all()
    if kind != "linformer":
        assert (out[1] == 0).all()


@pytest.mark.parametrize("kind", CAUSAL_KINDS)
def test_causal_looks_back_only(kind: AttentionKind) -> None:
    attention, x = layer(kind, causal=True), tokens()
    changed = x.clone()
    changed[:, 6:] += tokens(length=5, seed=5)
    if kind == "performer":  # the factor that cancels is of all keys
        torch.testing.assert_close(attention(changed)[:, :6], attention(x)[:, :6], atol=1e-5, rtol=1e-4)
    else:
        torch.testing.assert_close(attention(changed)[:, :6], attention(x)[:, :6])
    assert not torch.allclose(attention(changed)[:, 6:], attention(x)[:, 6:], atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_and_gradients(kind: AttentionKind) -> None:
    attention, x = layer(kind), tokens()
    half = layer(kind).to(torch.bfloat16)(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), attention(x), atol=0.03, rtol=0.1)
    keep = torch.ones(2, 11, dtype=torch.bool)
    keep[0, 3:] = False
    keep[1] = False
    attention(x, keep).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in attention.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_spec_round_trip_and_counts(kind: AttentionKind) -> None:
    attention, x = layer(kind, bias=True), tokens()
    again = WideAttention.empty(attention.spec())
    again.load_state_dict(attention.state_dict())
    assert again.spec() == attention.spec()
    torch.testing.assert_close(again(x), attention(x))
    assert attention.projection_parameters() == (2 if kind == "synthesizer" else 4) * 6 * 4 * 5
    assert torch.equal(layer(kind, seed=3).v_proj.weight, layer(kind, seed=3).v_proj.weight)
    assert not torch.equal(layer(kind, seed=3).v_proj.weight, layer(kind, seed=4).v_proj.weight)


def test_redrawing_changes_random_features_alone() -> None:
    attention = layer("performer")
    before = attention.projection.clone()
    attention.redraw_(5)
    assert not torch.equal(before, attention.projection)
    with pytest.raises(InputError, match="performer"):
        layer("softmax").redraw_(0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"head_dim": 0}, "head_dim: got 0"),
        ({"num_heads": 0}, "num_heads: got 0"),
        ({"kind": "local", "window": 4}, "window: got 4, expected an odd"),
        ({"kind": "local", "window": -1}, "window: got -1"),
        ({"kind": "linformer", "causal": True, "max_len": 8}, "linformer has no causal form"),
        ({"kind": "synthesizer", "causal": True, "max_len": 8}, "synthesizer has no causal form"),
        ({"kind": "linformer"}, "max_len: got None"),
        ({"kind": "linear_attention"}, "unknown kind of attention"),
    ],
)
def test_bad_settings(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        WideAttention(**({"dim": 6, "num_heads": 2, "head_dim": 5} | arguments))


def test_bad_inputs() -> None:
    for kind in ("linformer", "synthesizer"):
        with pytest.raises(InputError, match="got 17 tokens, expected at most max_len=16"):
            layer(kind)(tokens(length=17))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"mask: got shape \(2, 10\)"):
        layer("softmax")(tokens(), torch.ones(2, 10))
    with pytest.raises(InputError, match=r"expected \(batch, tokens, 6\)"):
        layer("softmax")(tokens(dim=5))
