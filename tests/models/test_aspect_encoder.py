from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from layerwright.core.errors import InputError
from layerwright.models.aspect_encoder import AspectEncoder, llama_family
from layerwright.models.aspect_report import aspect_flops, aspect_report
from layerwright.nn.wide_attention import AttentionKind

FIXED: dict[str, Any] = {
    "vocabulary": 20,
    "dim": 16,
    "head_dim": 6,
    "ffn_dim": 24,
    "max_len": 12,
    "classes": 3,
}


def ids(batch: int = 3, length: int = 9) -> Tensor:
    return torch.randint(20, (batch, length), generator=torch.Generator().manual_seed(0))


def expected_parameters(layers: int, heads: int, pool: str = "mean") -> int:
    d, inner, f = FIXED["dim"], heads * FIXED["head_dim"], FIXED["ffn_dim"]
    tables = (FIXED["vocabulary"] + FIXED["max_len"] + (pool == "cls")) * d
    block = 4 * d * inner + 4 * d + (2 * d * f + f + d)
    return tables + layers * block + 2 * d + (d + 1) * FIXED["classes"] + (d if pool == "cls" else 0)


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_parameters_are_those_of_the_formula(pool: str) -> None:
    for layers in (1, 2, 3, 6):
        model = AspectEncoder(layers=layers, heads_per_layer=12 // layers, pool=pool, **FIXED)  # type: ignore[arg-type]
        assert sum(p.numel() for p in model.parameters()) == expected_parameters(layers, 12 // layers, pool)


@pytest.mark.parametrize("kind", get_args(AttentionKind))
def test_family_keeps_heads_and_attention(kind: AttentionKind) -> None:
    models = AspectEncoder.family(12, attention=kind, **FIXED)
    assert [(m.layers, m.heads_per_layer) for m in models] == [(1, 12), (2, 6), (3, 4), (6, 2)]
    share = 2 if kind == "synthesizer" else 4
    assert {m.attention_parameters() for m in models} == {share * 16 * 6 * 12}
    assert len({sum(p.numel() for a in m.attentions for p in a.parameters()) for m in models}) == 1
    body = [m.body_parameters() for m in models]
    ffn_and_norms = 2 * 16 * 24 + 24 + 16 + 4 * 16
    assert [b - body[0] for b in body] == [0, ffn_and_norms, 2 * ffn_and_norms, 5 * ffn_and_norms]
    assert all(m(ids()).shape == (3, 3) for m in models)


@pytest.mark.parametrize("pool", ["mean", "cls"])
@pytest.mark.parametrize("kind", get_args(AttentionKind))
def test_padding_changes_nothing(kind: AttentionKind, pool: Any) -> None:
    model = AspectEncoder(layers=2, heads_per_layer=3, attention=kind, pool=pool, window=3, **FIXED).eval()
    longer = torch.cat([ids(), ids()[:, :3]], 1)
    keep = (torch.arange(12) < 9).expand(3, -1)
    torch.testing.assert_close(model(longer, keep), model(ids()), atol=1e-5, rtol=1e-4)


def test_importances_are_the_mean_of_heads_and_queries() -> None:
    model = AspectEncoder(layers=1, heads_per_layer=12, **FIXED)
    keep = torch.ones(3, 9, dtype=torch.bool)
    keep[1, 5:] = False
    found = model.importances(ids(), keep)
    torch.testing.assert_close(found.sum(1), torch.ones(3))
    assert (found[1, 5:] == 0).all()
    states = model.embedding(ids()) + model.positions.weight[:9]
    weights = model.attentions[0].weights(model.blocks[0].attention_norm(states), keep)  # type: ignore[operator]
    torch.testing.assert_close(found[1], weights[1, :, :5].mean((0, 1)))
    first = AspectEncoder(layers=2, heads_per_layer=6, pool="cls", **FIXED)
    assert first.importances(ids()).shape == (3, 10)


def test_shares_of_values_by_importance_make_the_pooled_attention() -> None:
    # One layer, mean pool: the mean of attention's output over tokens is a mix of values by the importances of each head.
    model = AspectEncoder(layers=1, heads_per_layer=1, **FIXED)
    attention, block = model.attentions[0], model.blocks[0]
    states = block.attention_norm(model.embedding(ids()) + model.positions.weight[:9])  # type: ignore[operator]
    pooled = attention(states).mean(1)
    mixed = torch.einsum("bj,bjd->bd", model.importances(ids()), attention.v_proj(states))
    torch.testing.assert_close(attention.o_proj(mixed), pooled)


def test_same_seed_same_weights() -> None:
    state = torch.random.get_rng_state()
    first, second, other = (AspectEncoder(layers=2, heads_per_layer=3, seed=s, **FIXED) for s in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first(ids()), second(ids()))
    assert not torch.equal(first(ids()), other(ids()))
    assert not torch.equal(first.attentions[0].v_proj.weight, first.attentions[1].v_proj.weight)


def test_bfloat16() -> None:
    model = AspectEncoder(layers=1, heads_per_layer=4, **FIXED)
    exact = model(ids())
    torch.testing.assert_close(model.to(torch.bfloat16)(ids()).float(), exact, atol=0.05, rtol=0.05)


def test_operations_are_those_of_the_formula() -> None:
    for model in AspectEncoder.family(12, **FIXED):
        cost = aspect_report([model], (1, 9), rounds=1)[0]
        classifier = 2 * FIXED["dim"] * FIXED["classes"]
        assert cost.flops == aspect_flops(model, 9) + classifier
        attention = 8 * 16 * 6 * 12 + 4 * 9 * 6 * 12
        assert aspect_flops(model, 9) == 9 * (attention + model.layers * 4 * 16 * 24)


def test_report_measures_what_depth_costs() -> None:
    threads = torch.get_num_threads()
    deep, wide = aspect_report(AspectEncoder.family(12, (6, 1), **FIXED), (2, 9), rounds=5)
    assert torch.get_num_threads() == threads
    assert (deep.name, wide.name) == ("6x2", "1x12")
    assert deep.relative_latency == 1
    assert 0 < wide.relative_latency < 1
    assert wide.operations < 0.4 * deep.operations
    assert wide.weight_ms < deep.weight_ms
    assert wide.overhead_ms < deep.overhead_ms
    assert 0 < wide.activation_bytes < deep.activation_bytes
    assert wide.parameters - wide.body_parameters == 32 * 16
    assert wide.to_data()["name"] == "1x12"
    # At least the input of every product in each layer is kept: norms, heads, hidden features.
    assert deep.activation_bytes >= 2 * 9 * 4 * 6 * (16 + 3 * 12 + 16 + 24)


def test_llamas_of_equal_attention() -> None:
    from transformers import LlamaForCausalLM

    sizes = []
    for config in llama_family(
        6, (1, 3), head_dim=8, hidden_size=24, intermediate_size=16, vocab_size=11, tie_word_embeddings=True
    ):
        with torch.random.fork_rng(devices=[]):
            model = LlamaForCausalLM(config)
        assert model(ids() % 11).logits.shape == (3, 9, 11)
        sizes.append(sum(p.numel() for n, p in model.named_parameters() if "self_attn" in n))
    assert sizes == [4 * 24 * 8 * 6] * 2
    with pytest.raises(InputError, match="num_attention_heads: the family sets it"):
        llama_family(6, (1,), head_dim=8, num_attention_heads=3)
    with pytest.raises(InputError, match=r"hidden_size: got 20, expected a multiple of \[6\] heads"):
        llama_family(6, (1, 3), head_dim=8, hidden_size=20)
    with pytest.raises(InputError, match="head_dim: got 0"):
        llama_family(6, (1,), head_dim=0)


def test_bad_families() -> None:
    with pytest.raises(InputError, match=r"layers: got \[5\], expected divisors of total_heads=12"):
        AspectEncoder.family(12, (1, 5), **FIXED)
    with pytest.raises(InputError, match="layers: got none"):
        AspectEncoder.family(12, (), **FIXED)
    with pytest.raises(InputError, match="heads_per_layer: a family sets it"):
        AspectEncoder.family(12, heads_per_layer=2, **FIXED)
    with pytest.raises(InputError, match="head_dim: got 0"):
        AspectEncoder.family(12, **(FIXED | {"head_dim": 0}))
    with pytest.raises(InputError, match="models: got none"):
        aspect_report([], (1, 4))
    with pytest.raises(InputError, match="rounds: got 0"):
        aspect_report(AspectEncoder.family(12, (1,), **FIXED), (1, 4), rounds=0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"layers": 0}, "layers: got 0"),
        ({"classes": 0}, "classes: got 0"),
        ({"pool": "max"}, "unknown pool 'max'"),
        ({"windw": 3}, "unknown setting of attention 'windw'; did you mean window"),
        ({"attention": "local", "window": 2}, "window: got 2"),
    ],
)
def test_bad_settings(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        AspectEncoder(**(FIXED | {"layers": 1, "heads_per_layer": 2} | changed))


def test_bad_inputs() -> None:
    model = AspectEncoder(layers=1, heads_per_layer=2, **FIXED)
    keep = torch.ones(3, 9)
    with pytest.raises(InputError, match=r"mask: got shape \(3, 8\), expected \(3, 9\)"):
        model(ids(), keep[:, 1:])
    keep[2] = 0
    with pytest.raises(ValueError, match="padding alone"):
        model(ids(), keep)
    for length in (0, 13):
        with pytest.raises(InputError, match="1 to 12 tokens"):
            model(ids(length=length))
