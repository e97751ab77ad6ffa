from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerwright.core.errors import InputError
from layerwright.nn.one_hot import OneHotEmbedding, OneHotHead, TokenDropout


def matrix(tokens: int, dim: int, padding: int | None) -> Tensor:
    weight = torch.eye(tokens, dim)
    if padding is not None:
        weight[padding] = 0
    return weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padding", [None, 5])
def test_equal_to_a_frozen_table(padding: int | None, dtype: torch.dtype) -> None:
    embedding = OneHotEmbedding(9, 12, padding).to(dtype)
    table = nn.Embedding.from_pretrained(matrix(9, 12, padding).to(dtype), freeze=True)
    ids = torch.randint(9, (4, 7), generator=torch.Generator().manual_seed(0))
    assert torch.equal(embedding(ids), table(ids) * embedding.scale)
    h = torch.randn(4, 7, 12).to(dtype)
    assert embedding.head is not None
    assert torch.equal(embedding.project(h), h @ table.weight.T * embedding.head.scale)
    if padding is not None:
        assert not embedding(torch.tensor([padding])).any() and not embedding.project(h)[..., padding].any()


def test_what_is_learned() -> None:
    embedding = OneHotEmbedding(9, 16, 0)
    assert {name: float(p.detach()) for name, p in embedding.named_parameters()} == {"scale": 4.0, "head.scale": 4.0}
    assert [name for name, _ in OneHotEmbedding(9, 16, output_scale=None).named_parameters()] == ["scale"]
    fixed = OneHotEmbedding(9, 16, scale=0.5, output_scale=2.0)
    assert list(fixed.parameters()) == [] and fixed.state_dict() == {}
    assert float(fixed(torch.tensor([3])).sum()) == 0.5


@pytest.mark.parametrize("which", ["scale", "head.scale"])
def test_gradient_of_the_scales_by_finite_difference(which: str) -> None:
    embedding = OneHotEmbedding(9, 12, 5).double()
    inner = torch.randn(12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ids = torch.randint(9, (3, 6), generator=torch.Generator().manual_seed(2))

    def loss() -> Tensor:
        logits = embedding.project(torch.tanh(embedding(ids) @ inner / 4))
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())

    loss().backward()
    scale = embedding.get_parameter(which)
    assert scale.grad is not None and float(scale.grad) != 0
    with torch.no_grad():
        scale += 1e-5
        above = float(loss())
        scale -= 2e-5
        below = float(loss())
    assert float(scale.grad) == pytest.approx((above - below) / 2e-5, rel=1e-6)


def test_dropout_of_a_one_hot_vector_erases_the_token() -> None:
    count, p = 100_000, 0.2
    torch.manual_seed(0)
    ids = torch.randint(259, (count,))
    dense = nn.Embedding(259, 288)
    with torch.no_grad():
        onehot = nn.functional.dropout(OneHotEmbedding(259, 288)(ids), p)
        erased = float((~onehot.any(-1)).float().mean())
        assert abs(erased - p) < 3 * (p * (1 - p) / count) ** 0.5
        assert bool(nn.functional.dropout(dense(ids[:20_000]), p).any(-1).all())


@pytest.mark.parametrize("rescale", [True, False])
def test_token_dropout(rescale: bool) -> None:
    dropout = TokenDropout(0.3, rescale, protect=(1,), generator=torch.Generator().manual_seed(0))
    ids = torch.randint(4, (100, 1000), generator=torch.Generator().manual_seed(1))
    x = torch.ones(100, 1000, 3)
    y = dropout(x, ids)
    factor = 1 / 0.7 if rescale else 1.0
    assert torch.equal(y[..., 0], y[..., 2])
    other = y[..., 0][ids != 1]
    assert other.unique().tolist() == pytest.approx([0.0, factor])
    assert abs(float((other == 0).float().mean()) - 0.3) < 3 * (0.21 / len(other)) ** 0.5
    assert bool((y[..., 0][ids == 1] > 0).all())
    assert dropout.eval()(x, ids) is x
    assert torch.equal(TokenDropout(0.0)(x), x)


def test_same_in_training_as_dropout_of_one_hot_vectors_in_distribution() -> None:
    ids = torch.randint(9, (1000, 100), generator=torch.Generator().manual_seed(3))
    torch.manual_seed(0)
    with torch.no_grad():
        x = OneHotEmbedding(9, 12, scale=1.0)(ids)
        one, other = nn.functional.dropout(x, 0.25), TokenDropout(0.25)(x)
    assert set(one.unique().tolist()) == set(other.unique().tolist())
    assert abs(float(one.mean() - other.mean())) < 3e-4


@pytest.mark.parametrize(
    "made", [OneHotEmbedding(9, 12, 5), OneHotEmbedding(9, 12, None, 0.5, None), OneHotHead(9, 12, 5, 2.0)]
)
def test_spec_there_and_back(made: Any) -> None:
    made = made.to(torch.bfloat16)
    other = type(made).empty(made.spec())
    other.load_state_dict(made.state_dict())
    assert other.spec() == made.spec()
    given = torch.randn(2, 3, 12).bfloat16() if isinstance(made, OneHotHead) else torch.tensor([[1, 5, 8]])
    assert torch.equal(other(given), made(given))


def test_bad_input() -> None:
    for kind in (OneHotEmbedding, OneHotHead):
        with pytest.raises(InputError, match="dim: got 8 for num_embeddings 9"):
            kind(9, 8)
        with pytest.raises(InputError, match="padding_idx: got 9, expected 0 to 8"):
            kind(9, 12, 9)
        with pytest.raises(InputError, match="num_embeddings: got 0"):
            kind(0, 12)
        with pytest.raises(InputError, match="scale: got 'fixed'"):
            kind(9, 12, scale="fixed")  # type: ignore[arg-type]
    embedding = OneHotEmbedding(9, 12)
    for wrong in (9, -1):
        with pytest.raises(InputError, match="expected 0 to 8"):
            embedding(torch.tensor([wrong]))
    with pytest.raises(TypeError, match="whole numbers"):
        embedding(torch.tensor([1.0]))
    with pytest.raises(InputError, match="expected 12"):
        embedding.project(torch.zeros(2, 9))
    with pytest.raises(InputError, match="made without one"):
        OneHotEmbedding(9, 12, output_scale=None).project(torch.zeros(2, 12))
    for p in (-0.1, 1.0):
        with pytest.raises(InputError, match="p: got"):
            TokenDropout(p)
    with pytest.raises(InputError, match="known by their ids"):
        TokenDropout(0.1, protect=(1,))(torch.zeros(2, 3))
    with pytest.raises(InputError, match=r"ids: got shape \(3,\)"):
        TokenDropout(0.1)(torch.zeros(2, 3), torch.zeros(3))
