from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from layerwright.core.errors import InputError
from layerwright.nn.sequence_core import CoreKind, SequenceCore, parameter_count

FORMS: list[dict[str, Any]] = [
    {"kind": "lstm"},
    {"kind": "gru", "layers": 2},
    {"kind": "transformer"},
    {"kind": "transformer", "layers": 3, "norm": "pre", "heads": 4, "ffn": 7},
]


def core(dim: int = 6, hidden: int = 8, **settings: Any) -> SequenceCore:
    return SequenceCore(dim=dim, hidden=hidden, max_len=12, **settings).double()


def inputs(dim: int = 6, tokens: int = 9) -> Tensor:
    return torch.randn(3, tokens, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("form", FORMS)
def test_steps_and_chunks_equal_one_call(form: dict[str, Any]) -> None:
    layer, x = core(**form), inputs()
    whole, _ = layer(x)
    assert whole.shape == (3, 9, 8)
    state, outputs = layer.init_state(3), []
    for place in range(9):
        out, state = layer(x[:, place : place + 1], state)
        outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs, 1), whole)
    first, state = layer(x[:, :4])
    second, state = layer(x[:, 4:7], state)
    third, _ = layer(x[:, 7:], state)
    torch.testing.assert_close(torch.cat([first, second, third], 1), whole)


@pytest.mark.parametrize("form", FORMS)
def test_the_future_changes_nothing_before_it(form: dict[str, Any]) -> None:
    layer, x = core(**form), inputs()
    before, _ = layer(x)
    for place in range(9):
        changed = x.clone()
        changed[:, place] += 1
        after, _ = layer(changed)
        assert torch.equal(after[:, :place], before[:, :place])
        assert not torch.allclose(after[:, place], before[:, place])


@pytest.mark.parametrize("pre", [False, True])
def test_transformer_is_the_encoder_layer_of_torch(pre: bool) -> None:
    layer, x = core(dim=8, kind="transformer", norm="pre" if pre else "post", ffn=10), inputs(8)
    peer = nn.TransformerEncoderLayer(8, 2, 10, 0.0, batch_first=True, norm_first=pre).double()
    block = layer.blocks[0]
    pairs = {
        peer.self_attn.in_proj_weight: block.qkv.weight,
        peer.self_attn.in_proj_bias: block.qkv.bias,
        peer.self_attn.out_proj.weight: block.out.weight,
        peer.self_attn.out_proj.bias: block.out.bias,
        peer.linear1.weight: block.up.weight,
        peer.linear1.bias: block.up.bias,
        peer.linear2.weight: block.down.weight,
        peer.linear2.bias: block.down.bias,
    }
    with torch.no_grad():
        for theirs, ours in pairs.items():
            theirs.copy_(ours.uniform_(-0.7, 0.7))
    entered = x * 8**0.5 + layer.positions[:9]
    expected = peer(entered, src_mask=nn.Transformer.generate_square_subsequent_mask(9, dtype=torch.float64))
    if pre:
        expected = nn.functional.layer_norm(expected, (8,))
    torch.testing.assert_close(layer(x)[0], expected)
    assert sum(p.numel() for p in peer.parameters()) == parameter_count(layer) - (16 if pre else 0)


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16(form: dict[str, Any]) -> None:
    layer, x = core(**form), inputs()
    half = core(**form).bfloat16()
    out, state = half(x.bfloat16())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), layer(x)[0], atol=0.08, rtol=0.08)
    assert half(x[:, :1].bfloat16(), state)[0].isfinite().all()


def test_widths_that_match_parameters() -> None:
    lstm = SequenceCore("lstm", 32, 32)
    assert parameter_count(lstm) == 4 * (32 * 64 + 64)
    for settings in ({}, {"norm": "pre"}, {"heads": 4}, {"hidden": 24}):
        found = SequenceCore.matching(lstm, **settings)
        assert found.kind == "transformer"
        assert abs(parameter_count(found) - parameter_count(lstm)) <= 0.03 * parameter_count(lstm)
    with pytest.raises(InputError, match="take fewer layers"):
        SequenceCore.matching(lstm, layers=3)


@pytest.mark.parametrize("form", FORMS)
def test_forms_there_and_back(form: dict[str, Any]) -> None:
    layer, x = core(**form), inputs()
    again = SequenceCore.empty(layer.spec()).double()
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x)[0], layer(x)[0])
    before = torch.get_rng_state()
    assert torch.equal(core(**form)(x)[0], layer(x)[0])
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(core(**form, seed=1)(x)[0], layer(x)[0])
    assert layer.kind in str(layer)


def test_bad_input() -> None:
    with pytest.raises(InputError, match="heads: got 3, which does not divide hidden=8"):
        core(kind="transformer", heads=3)
    with pytest.raises(InputError, match="unknown kind of sequence core 'rnn'"):
        core(kind="rnn")
    with pytest.raises(InputError, match="unknown norm"):
        core(norm="rms")
    with pytest.raises(InputError, match="layers: got 0"):
        core(layers=0)
    layer = core(kind="transformer")
    with pytest.raises(InputError, match="got 13 tokens, expected at most max_len=12"):
        layer(torch.zeros(1, 13, 6, dtype=torch.float64))
    _, state = layer(inputs())
    with pytest.raises(InputError, match="got 18 tokens"):
        layer(inputs(), state)
    with pytest.raises(InputError, match="expected"):
        layer(torch.zeros(1, 3, 5))
    assert set(get_args(CoreKind)) == {"lstm", "gru", "transformer"}
