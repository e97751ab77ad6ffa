from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerwright.core.errors import InputError
from layerwright.nn.adaptive_token_attention import (
    AdaptiveTokenSampler,
    ATSBlock,
    Packing,
    TokenSampling,
)


def tokens(count: int = 3, length: int = 13, dim: int = 16, seed: int = 0) -> Tensor:
    return torch.randn(count, length, dim, generator=torch.Generator().manual_seed(seed))


def block(sampling: TokenSampling | None, peak: float = 12.0, **settings: Any) -> ATSBlock:
    torch.manual_seed(0)
    made = ATSBlock(16, 4, sampling, **settings).eval()
    with torch.no_grad():
        made.attn.qkv.weight[:32].mul_(peak)
    return made


def test_without_sampling_it_is_a_plain_block() -> None:
    made, x = block(None, peak=1), tokens()
    attention = nn.MultiheadAttention(16, 4, batch_first=True)
    with torch.no_grad():
        attention.in_proj_weight.copy_(made.attn.qkv.weight)
        attention.in_proj_bias.copy_(made.attn.qkv.bias)
    attention.out_proj.load_state_dict(made.attn.proj.state_dict())
    normed = made.norm1(x)
    middle = x + attention(normed, normed, normed, need_weights=False)[0]
    out, mask = made(x)
    torch.testing.assert_close(out, middle + made.mlp(made.norm2(middle)))
    assert mask is None


@pytest.mark.parametrize("score_from", ["class_token", "mean_attention"])
def test_kept_rows_are_those_of_the_plain_block(score_from: Any) -> None:
    x, special = tokens(), 1 if score_from == "class_token" else 0
    sampled = block(TokenSampling(6, special, score_from=score_from))
    plain = block(None)
    out, mask = sampled(x)
    _, rows, kept = sampled.attn(sampled.norm1(x))
    assert mask is not None and torch.equal(kept, mask) and out.shape[1] < 13
    whole, _ = plain(x)
    for image in range(3):
        there = rows[image][mask[image]]
        assert bool((there.diff() > 0).all()) and (not special or there[0] == 0)
        torch.testing.assert_close(out[image][mask[image]], whole[image, there], atol=1e-6, rtol=1e-5)
    assert not out[~mask].any()


def test_mean_attention_is_the_mean_of_the_rows() -> None:
    """A network without class token: the score is the mean attention that a token gets, times the length of its value."""
    layer = AdaptiveTokenSampler(16, 4, TokenSampling(5, 0, score_from="mean_attention"))
    x = tokens(1)
    query, key, value = (part.view(13, 4, 4).transpose(0, 1) for part in layer.qkv(x)[0].chunk(3, -1))
    attention = (query @ key.transpose(1, 2) / 2).softmax(-1)
    score = attention.mean(1).sum(0) * value.transpose(0, 1).flatten(1).norm(dim=1)
    sums = (score / score.sum()).cumsum(0)
    expected = sorted({int((sums >= (2 * k - 1) / 10).nonzero()[0]) for k in range(1, 6)})
    assert layer(x)[1].tolist() == [expected]


def test_two_blocks_give_an_image_the_same_alone_and_in_a_batch() -> None:
    first, second = block(TokenSampling()), block(TokenSampling(0.5))
    x = tokens(5)

    def run(images: Tensor) -> list[Tensor]:
        middle, mask = first(images)
        out, kept = second(middle, mask, tokens=12)
        assert kept is not None
        return [image[there] for image, there in zip(out, kept, strict=True)]

    together = run(x)
    assert len({len(image) for image in together}) > 1
    for number in range(5):
        torch.testing.assert_close(run(x[number : number + 1])[0], together[number], atol=1e-6, rtol=1e-5)


def test_padding_is_neither_seen_nor_handed_on() -> None:
    made, x = block(TokenSampling(8)), tokens()
    mask = torch.ones(3, 13, dtype=torch.bool)
    mask[1, 9:] = False
    other = x.clone()
    other[1, 9:] = 1e3
    for left, right in zip(made(x, mask), made(other, mask), strict=True):
        assert torch.equal(left, right)


def test_gradients_and_bfloat16() -> None:
    made, x = block(TokenSampling(4)).train(), tokens().requires_grad_()
    made(x)[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in made.parameters())
    out, _ = made.bfloat16()(tokens().bfloat16())
    assert out.dtype == torch.bfloat16 and out.isfinite().all()


def test_packing_is_undone_by_padding() -> None:
    x, mask = tokens(), torch.rand(3, 13, generator=torch.Generator().manual_seed(1)) < 0.5
    packing = Packing(mask)
    packed = packing.pack(x)
    assert torch.equal(packed, x[mask])
    assert torch.equal(packing.pad(packed, 3), x * mask[:, :, None])
    assert torch.equal(packing.pad(packed, 3, zeros=False)[mask], x[mask])
    assert torch.equal(Packing().pad(Packing().pack(x), 3), x)


@pytest.mark.parametrize("padded", [False, True])
def test_rows_that_go_on_are_found_among_the_packed_ones(padded: bool) -> None:
    x = tokens()
    mask = torch.ones(3, 13, dtype=torch.bool)
    mask[0, 9:] = not padded
    before = Packing(mask if padded else None)
    positions = torch.tensor([[0, 3, 8], [0, 5, 12], [0, 1, 1]])
    kept = Packing(torch.tensor([[True] * 3, [True] * 3, [True, True, False]]))
    rows = before.pack(x).index_select(0, before.rows(positions, kept, 13))
    assert torch.equal(rows, torch.cat([x[0, [0, 3, 8]], x[1, [0, 5, 12]], x[2, [0, 1]]]))


def test_points() -> None:
    assert [TokenSampling(0.25).points(196), TokenSampling(20).points(196), TokenSampling(1e-9).points(9)] == [
        49,
        20,
        1,
    ]
    assert [TokenSampling(3, mode="official").points(n) for n in (196, 5)] == [8, 5]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": float("nan")}, "max_tokens"),
        ({"special": 0}, "score_from='mean_attention'"),
        ({"special": -1, "score_from": "mean_attention"}, "special"),
        ({"score_from": "top"}, "score_from"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TokenSampling(**settings)


def test_bad_shapes_are_named() -> None:
    with pytest.raises(InputError, match="num_heads"):
        ATSBlock(16, 3)
    layer = AdaptiveTokenSampler(16, 4)
    for x in (tokens(dim=8), tokens(length=1), tokens(count=0), tokens()[0]):
        with pytest.raises(InputError, match="x: got"):
            layer(x)
    with pytest.raises(InputError, match="mask"):
        layer(tokens(), torch.ones(3, 4, dtype=torch.bool))
