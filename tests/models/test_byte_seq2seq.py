from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerwright.core.errors import InputError
from layerwright.models._byte_layers import DecoderCache, sinusoids
from layerwright.models.byte_seq2seq import ByteSeq2Seq
from layerwright.nn.one_hot import OneHotEmbedding

SMALL: dict[str, Any] = {
    "dim": 16, "enc_layers": 2, "dec_layers": 2, "heads": 2, "ffn": 24, "vocabulary": 12, "padding": 9, "bos": 10, "eos": 11,
}  # fmt: skip


def small(**settings: Any) -> ByteSeq2Seq:
    model = ByteSeq2Seq(**SMALL | settings)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    return model.eval()


@cache
def trained(embed: Any = "onehot") -> ByteSeq2Seq:
    """Learns a little of how to repeat its source, so that what it gives depends on it and ends."""
    model = ByteSeq2Seq(**SMALL, embed=embed, dropout=0.0).train()
    optimizer, draw = torch.optim.Adam(model.parameters(), 1e-2), torch.Generator().manual_seed(5)
    for step in range(100):
        src = torch.randint(9, (32, 4), generator=draw)
        ends = [torch.full((32, 1), token) for token in (10, 11)]
        logits = model(src, torch.cat([ends[0], src], 1))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), torch.cat([src, ends[1]], 1).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == 0:
            first = float(loss.detach())
    assert float(loss.detach()) < 0.8 * first
    return model.eval()


def source(rows: int = 3) -> Tensor:
    ids = torch.randint(9, (rows, 7), generator=torch.Generator().manual_seed(0))
    ids[0, 4:] = 9
    return ids


@pytest.mark.parametrize("embed", ["onehot", "learned"])
def test_cached_steps_give_the_logits_of_the_whole(embed: Any) -> None:
    model, src = small(embed=embed), source()
    tgt = torch.randint(9, (3, 8), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = model(src, tgt)
        encoded, mask = model.encode(src)
        cache = DecoderCache()
        steps = [model.step(tgt[:, i : i + 1], encoded, mask, cache) for i in range(8)]
    torch.testing.assert_close(torch.stack(steps, 1), whole, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("beam", [1, 4])
def test_cache_changes_nothing(beam: int) -> None:
    model, src = trained(), source()
    found = model.generate(src, beam=beam, max_length=12)
    assert found == model.generate(src, beam=beam, max_length=12, cache=False)
    assert all(token not in (9, 10, 11) for row in found for token in row)


def slow_beam(model: ByteSeq2Seq, src: Tensor, beam: int, length_penalty: float, max_length: int) -> list[int]:
    """One source; lists of hypotheses."""
    kept = [((10,), 0.0, False)]
    for _ in range(max_length):
        found = []
        for tokens, score, done in kept:
            if done:
                found.append((tokens, score, True))
                continue
            with torch.no_grad():
                following = model(src[None], torch.tensor([tokens]))[0, -1].log_softmax(-1).tolist()
            found += [((*tokens, t), score + s, t == 11) for t, s in enumerate(following) if t not in (9, 10)]
        found.sort(key=lambda h: -h[1] / (len(h[0]) - 1) ** length_penalty)
        kept = found[:beam]
        if all(done for _, _, done in kept):
            break
    return [token for token in kept[0][0][1:] if token != 11]


@pytest.mark.parametrize("embed", ["onehot", "learned"])
@pytest.mark.parametrize(("beam", "length_penalty"), [(1, 1.0), (3, 1.0), (4, 0.0)])
def test_search_against_lists_of_hypotheses(beam: int, length_penalty: float, embed: Any) -> None:
    model, src = trained(embed), source(8)
    found = model.generate(src, beam=beam, length_penalty=length_penalty, max_length=7)
    assert found == [slow_beam(model, row[row != 9], beam, length_penalty, 7) for row in src]
    assert len({tuple(row) for row in found}) > 4


def test_padding_of_the_source_does_not_count() -> None:
    model, src = small(), source()
    tgt = torch.tensor([[10, 3, 4]])
    with torch.no_grad():
        cut, padded = model(src[:1, :4], tgt), model(src[:1], tgt)
        torch.testing.assert_close(cut, padded, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model(src[:1], tgt, src[:1] != 9, torch.ones(1, 3)), padded, atol=1e-5, rtol=1e-5)
        hidden = model(src[:1], tgt, tgt_mask=torch.tensor([[1, 0, 1]]))
    assert torch.allclose(hidden[:, 0], padded[:, 0], atol=1e-5) and not torch.allclose(
        hidden[:, 2], padded[:, 2], atol=1e-4
    )


def test_no_token_sees_the_next() -> None:
    model, src = small(), source()
    one, other = (torch.tensor([[10, 3, last]] * 3) for last in (4, 5))
    with torch.no_grad():
        assert torch.allclose(model(src, one)[:, :2], model(src, other)[:, :2], atol=1e-6)


def test_what_is_without_embeddings() -> None:
    model = ByteSeq2Seq(272, 1, 2, 4, 64, dropout=0.3)
    learned = ByteSeq2Seq(272, 1, 2, 4, 64, dropout=0.3, embed="learned")
    scales = {name: float(p.detach()) for name, p in model.named_parameters() if "scale" in name}
    assert len(scales) == 3 and list(scales.values()) == pytest.approx([math.sqrt(272)] * 3)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model, learned)]
    assert sizes[1] - sizes[0] == 2 * 259 * 272 - 3
    assert model.source_input.dropout.p == 0 and learned.source_input.dropout.p == 0.3
    assert model.target_input.dropout.p == learned.target_input.dropout.p == 0.3
    rates: list[list[float]] = [[layer.dropout.p for layer in m.decoder_layers] for m in (model, learned)]  # type: ignore[union-attr,misc]
    assert rates == [[0.3, 0.0], [0.3, 0.3]]
    assert isinstance(model.source_input.embedding, OneHotEmbedding)
    assert isinstance(learned.target_input.embedding, nn.Embedding)
    assert ByteSeq2Seq(272, 1, 1, decoder_input_dropout=0.0).target_input.dropout.p == 0


def test_logits_are_features() -> None:
    model, src = small(), source()
    seen = []
    model.decoder_layers[-1].register_forward_hook(lambda _m, _a, output: seen.append(output))
    with torch.no_grad():
        logits = model(src, torch.tensor([[10]] * 3))
    expected = seen[0][..., :12].clone()
    expected[..., 9] = 0
    head = model.target_input.embedding.head
    assert isinstance(head, nn.Module)
    assert torch.allclose(logits, expected * head.scale)


def test_training_is_evaluation_without_dropout_and_only_then() -> None:
    src, tgt = source(), torch.tensor([[10, 1, 2]] * 3)
    model = small(dropout=0.0)
    assert torch.equal(model.train()(src, tgt), model.eval()(src, tgt))
    for settings in ({"dropout": 0.3}, {"dropout": 0.0, "token_dropout": 0.5}):
        other = small(**settings)
        torch.manual_seed(0)
        assert not torch.equal(other.train()(src, tgt), other.eval()(src, tgt))


def test_seed_dtype_and_settings() -> None:
    state = torch.random.get_rng_state()
    one, other = ByteSeq2Seq(**SMALL, seed=4), ByteSeq2Seq(**SMALL, seed=4)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    again = ByteSeq2Seq(**one.settings())
    again.load_state_dict(one.state_dict())
    half = one.bfloat16()
    assert half(source(), torch.tensor([[10]] * 3)).dtype == torch.bfloat16
    assert len(half.generate(source(), max_length=3)) == 3


def test_positions() -> None:
    table = sinusoids(5, 6)
    rate = 10_000 ** (-1 / 2)
    assert float(table[3, 1]) == pytest.approx(math.sin(3 * rate)) and float(table[3, 4]) == pytest.approx(
        math.cos(3 * rate)
    )
    assert torch.equal(sinusoids(2, 6, 3), table[3:]) and sinusoids(2, 7).shape == (2, 7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dim": 10}, "dim: got 10 for num_embeddings 12"),
        ({"heads": 3}, "heads: got 3"),
        ({"embed": "hot"}, "unknown embed 'hot'"),
        ({"dropout": 1.0}, "dropout: got 1"),
        ({"token_dropout": -0.1}, "p: got -0.1"),
        ({"decoder_input_dropout": 2.0}, "decoder_input_dropout: got 2"),
        ({"enc_layers": 0}, "enc_layers: got 0"),
        ({"eos": 10}, "three tokens"),
        ({"padding": 12}, "three tokens below 12"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ByteSeq2Seq(**SMALL | settings)


def test_bad_input() -> None:
    model, tgt = small(), torch.tensor([[10]])
    with pytest.raises(InputError, match="got 4097 tokens, expected at most 4096"):
        model(torch.zeros(1, 4097, dtype=torch.long), tgt)
    with pytest.raises(InputError, match="expected 0 to 11"):
        model(torch.tensor([[12]]), tgt)
    with pytest.raises(TypeError, match="whole numbers"):
        model(torch.tensor([[1.0]]), tgt)
    with pytest.raises(InputError, match="without tokens"):
        model(torch.tensor([[9, 9]]), tgt)
    with pytest.raises(InputError, match=r"expected \(batch, tokens\)"):
        model(torch.tensor([1]), tgt)
    with pytest.raises(InputError, match="tgt_in: got 1 rows, expected 3"):
        model(source(), tgt)
    with pytest.raises(InputError, match="src_mask"):
        model(source(1), tgt, torch.ones(1, 3))
    with pytest.raises(InputError, match="tgt_mask"):
        model(source(1), tgt, None, torch.ones(1, 3))
    with pytest.raises(InputError, match="beam: got 0"):
        model.generate(source(), beam=0)
    with pytest.raises(InputError, match="max_length: got 4096"):
        model.generate(source(), max_length=4096)
