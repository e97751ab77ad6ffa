from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from layerwright.core.errors import InputError, NotFiniteError
from layerwright.models.masked_autoencoder import ImageEncoder
from layerwright.models.masked_lm import masked_lm
from layerwright.score.smoothing import (
    frequency_profile,
    hc_ratio,
    high_frequency_share,
    pairwise_cosine,
    smoothing_rate,
    token_cosine,
)
from oracles import bamboo as oracle


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 12), st.integers(1, 9), st.integers(0, 1000))
def test_parts_are_orthogonal_and_shares_follow(tokens: int, dim: int, seed: int) -> None:
    x = drawn(tokens, dim, seed=seed)
    mean, rest = oracle.parts(x)
    whole = float(x.double().square().sum())
    assert (mean**2).sum() + (rest**2).sum() == pytest.approx(whole)
    assert float(high_frequency_share(x)) == pytest.approx(((rest**2).sum() / whole) ** 0.5, rel=1e-4, abs=1e-5)
    assert float(pairwise_cosine(x)) == pytest.approx(oracle.pairwise_cosine(x), abs=1e-5)


def test_scaling_and_order_of_tokens_do_not_matter() -> None:
    x = drawn(3, 7, 5)
    share, cosine = high_frequency_share(x), pairwise_cosine(x)
    moved = 3.7 * x[:, torch.randperm(7, generator=torch.Generator().manual_seed(1))]
    torch.testing.assert_close(high_frequency_share(moved), share)
    torch.testing.assert_close(pairwise_cosine(moved), cosine)
    assert not torch.allclose(high_frequency_share(x + 1), share)  # a common shift does matter


def test_uniform_attention_leaves_no_difference() -> None:
    x = drawn(6, 4)
    mixed = torch.full((6, 6), 1 / 6) @ x
    assert float(high_frequency_share(mixed)) < 1e-6
    assert float(pairwise_cosine(mixed)) == pytest.approx(1)
    assert float(smoothing_rate(torch.full((6, 6), 1 / 6))) < 1e-12


def test_cosine_of_zeros_and_opposites() -> None:
    assert float(pairwise_cosine(torch.zeros(4, 3))) == 0
    assert float(high_frequency_share(torch.zeros(4, 3))) == 0
    assert float(pairwise_cosine(torch.tensor([[1.0, 0], [-2, 0]]))) == pytest.approx(-1)


def test_rate_equals_a_dense_svd() -> None:
    for seed in range(6):
        attn = (3 * drawn(2, 9, 9, seed=seed)).softmax(-1)
        found = smoothing_rate(attn)
        assert found.shape == (2,)
        expected = [oracle.smoothing_rate(a) for a in attn]
        assert found.tolist() == pytest.approx(expected, rel=1e-5)


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 8), st.integers(0, 1000))
def test_doubly_stochastic_maps_never_amplify(n: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    shares = torch.rand(5, generator=draw).double()
    orders = [torch.eye(n).double()[torch.randperm(n, generator=draw)] for _ in shares]
    attn = sum(share * order for share, order in zip(shares / shares.sum(), orders, strict=True))
    assert isinstance(attn, Tensor)
    assert float(smoothing_rate(attn)) <= 1 + 1e-9
    assert float(smoothing_rate(orders[0])) == pytest.approx(1)


def test_rate_bounds_what_is_left_of_differences() -> None:
    attn, x = (2 * drawn(8, 8)).softmax(-1).double(), drawn(8, 5, seed=1).double()

    def left(values: Tensor) -> float:
        return float((values - values.mean(0)).norm())

    assert left(attn @ x) <= float(smoothing_rate(attn)) * left(x) + 1e-9


class Tokens(nn.Module):
    """Two blocks whose outputs are known: one adds a constant token, one mixes all tokens evenly."""

    class Shift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x + 1 + 0 * self.a(x)

    class Mix(Shift):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean(1, keepdim=True).expand_as(x) + 0 * self.a(x)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([self.Shift(), self.Mix()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_measures_by_block() -> None:
    model, batches = Tokens(), [drawn(2, 6, 4), drawn(1, 6, 4, seed=1)]
    outputs = torch.cat(batches) + 1
    shares = hc_ratio(model, batches)
    assert list(shares) == ["blocks.0", "blocks.1"]
    assert shares["blocks.0"] == pytest.approx(float(high_frequency_share(outputs).mean()), rel=1e-5)
    assert shares["blocks.1"] == pytest.approx(0, abs=1e-6)
    cosines = token_cosine(model, batches)
    assert cosines["blocks.0"] == pytest.approx(float(pairwise_cosine(outputs).mean()), rel=1e-5)
    assert cosines["blocks.1"] == pytest.approx(1, abs=1e-5)
    without = hc_ratio(model, batches, drop_cls=True)["blocks.0"]
    assert without == pytest.approx(float(high_frequency_share(outputs[:, 1:]).mean()), rel=1e-5)
    assert hc_ratio(model, batches, blocks=["blocks.0"]) == {"blocks.0": shares["blocks.0"]}
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("grid", [(2, 3), (4, 4), (3, 2)])
def test_frequencies_equal_explicit_waves(grid: tuple[int, int]) -> None:
    tokens = grid[0] * grid[1]
    x = drawn(2, tokens, 4)
    found = frequency_profile(Tokens(), [x], grid)
    expected = oracle.diagonal_amplitudes(x + 1, *grid)
    assert found["blocks.0"] == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert found["blocks.0"][0] == 0 and found["blocks.1"][-1] < -10


def test_on_models_of_ours_and_of_transformers() -> None:
    encoder = ImageEncoder(16, 4, 1, 16, 3, 2)
    images = [drawn(4, 1, 16, 16)]
    assert len(hc_ratio(encoder, images)) == 3
    profile = frequency_profile(encoder, images, (4, 4), drop_cls=True)
    assert {len(values) for values in profile.values()} == {3}
    bert = masked_lm(16, 2, 2, max_len=12)
    ids = torch.randint(256, (3, 12), generator=torch.Generator().manual_seed(0))
    for measure in (hc_ratio, token_cosine):
        values = measure(bert, [{"input_ids": ids}])
        assert len(values) == 2 and all(0 < value < 1 for value in values.values())


def test_half_precision() -> None:
    x = drawn(3, 40, 16)
    assert high_frequency_share(x.bfloat16()).dtype == torch.float32
    torch.testing.assert_close(high_frequency_share(x.bfloat16()), high_frequency_share(x), atol=0.01, rtol=0)
    torch.testing.assert_close(pairwise_cosine(x.bfloat16()), pairwise_cosine(x), atol=0.01, rtol=0)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: high_frequency_share(torch.zeros(1, 4)), "2 or more tokens"),
        (lambda: hc_ratio(Tokens(), [torch.zeros(2, 1, 4)]), "2 or more tokens"),
        (
            lambda: frequency_profile(Tokens(), [torch.zeros(2, 7, 4)], (2, 3)),
            "2 x 3 does not match 7 tokens; drop_cls",
        ),
        (lambda: frequency_profile(Tokens(), [torch.zeros(2, 9, 4)], (2, 3)), "does not match 9 tokens"),
        (lambda: frequency_profile(Tokens(), [torch.zeros(2, 6, 4)], (1, 6)), "at least 2 x 2"),
        (lambda: smoothing_rate(torch.zeros(3, 4)), "attn: got shape"),
        (lambda: smoothing_rate(torch.ones(1, 1)), "attn: got shape"),
        (lambda: smoothing_rate(torch.eye(3), 0), "iterations: got 0"),
    ],
)
def test_bad_input(call: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        call()


def test_what_is_not_finite_is_told() -> None:
    broken = torch.full((2, 6, 4), float("nan"))
    for call in (
        lambda: high_frequency_share(broken),
        lambda: pairwise_cosine(broken),
        lambda: smoothing_rate(broken[0, :4]),
    ):
        with pytest.raises(NotFiniteError):
            call()
    model = Tokens()
    nn.init.constant_(model.blocks[0].a.weight, float("inf"))  # type: ignore[union-attr, arg-type]
    with pytest.raises(NotFiniteError, match="features"):
        hc_ratio(model, [torch.zeros(2, 6, 4)])
