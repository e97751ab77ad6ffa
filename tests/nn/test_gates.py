"""Gates of tokens, and the choice of the largest."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwright.core.errors import InputError
from layerwright.nn.gates import TokenMixer, TokenRouter, tokens_kept, top_tokens


def test_router_is_a_sigmoid_that_begins_at_one_half() -> None:
    router = TokenRouter(5)
    x = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(router(x), torch.full((2, 3), 0.5))
    router.weight.data = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0])
    assert torch.allclose(router(x), 1 / (1 + torch.exp(-(x * router.weight).sum(-1))), atol=1e-6)
    assert router.to(torch.bfloat16)(x.bfloat16()).dtype == torch.float32
    assert list(router.state_dict()) == ["weight"]


@pytest.mark.parametrize("start", [1e-4, 0.3, 0.5, 0.9])
def test_mixer_begins_where_it_is_told_and_is_a_sigmoid_of_twice(start: float) -> None:
    mixer = TokenMixer(4, start)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    assert mixer(x).tolist() == pytest.approx([start] * 3, rel=1e-3)
    mixer.weight.data = torch.randn(4, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(mixer(x), torch.sigmoid(2 * (x @ mixer.weight + mixer.bias)), atol=1e-6)
    assert sum(p.numel() for p in mixer.parameters()) == 5


@pytest.mark.parametrize("start", [0.0, 1.0, -0.5, float("nan")])
def test_a_gate_that_cannot_begin_there(start: float) -> None:
    with pytest.raises(InputError, match="init_gate"):
        TokenMixer(4, start)


@given(st.integers(1, 300), st.integers(1, 100))
@settings(max_examples=60, deadline=None)
def test_counts_are_exact(count: int, percent: int) -> None:
    assert tokens_kept(count, percent / 100) == max(1, -(-count * percent // 100))


@given(
    st.lists(st.tuples(st.integers(-4, 4), st.booleans()), min_size=1, max_size=12),
    st.fractions(Fraction(1, 20), 1, max_denominator=20),
)
@settings(max_examples=80, deadline=None)
def test_largest_among_real_tokens_with_what_ties(tokens: list[tuple[int, bool]], share: Fraction) -> None:
    values = torch.tensor([float(v) for v, _ in tokens])
    real = torch.tensor([r for _, r in tokens])
    mask = top_tokens(values, float(share), real)
    found = sorted((v for v, r in tokens if r), reverse=True)
    if not found:
        assert not mask.any()
        return
    kept = max(1, -(-share.numerator * len(found) // share.denominator))
    assert mask.tolist() == [r and v >= found[kept - 1] for v, r in tokens]


def test_shares_above_one_are_all() -> None:
    real = torch.tensor([[True, True, False]])
    assert torch.equal(top_tokens(torch.randn(2, 1, 3), 1.4, real), real.expand(2, 1, 3))
