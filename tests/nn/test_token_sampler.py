from __future__ import annotations

import math

import pytest
import torch
from tests.oracles.token_sampler import sample
from torch import Tensor

from layerwright.core.errors import InputError
from layerwright.nn.token_sampler import inverse_transform_sample, token_significance


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def kept(scores: Tensor, points: int, **options: object) -> list[list[int]]:
    positions, mask = inverse_transform_sample(scores, points, **options)  # type: ignore[arg-type]
    return [row[there].tolist() for row, there in zip(positions, mask, strict=True)]


@pytest.mark.parametrize("rule", ["inverse", "nearest"])
def test_samples_are_those_of_a_scan(rule: str) -> None:
    for case in range(10):
        draw = draws(case)
        tokens, points = int(torch.randint(1, 30, (), generator=draw)), int(torch.randint(1, 40, (), generator=draw))
        scores = torch.rand(100, tokens, generator=draw, dtype=torch.float64).clamp_min(0.05) ** 4
        scores = scores * (torch.rand(100, tokens, generator=draw) > 0.2)
        scores[:, int(torch.randint(tokens, (), generator=draw))] += 0.1
        grid = [(2 * k - 1) / (2 * points) for k in range(1, points + 1)]
        found = kept(scores, points, rule=rule)
        assert found == [sample(row, grid, rule) for row in scores.tolist()]
        assert max(map(len, found)) <= min(points, tokens)
        for row, picked in zip(scores, found, strict=True):
            assert picked == sorted(set(picked)) and (row[picked] > 0).all()


def test_how_many_are_kept() -> None:
    uniform = torch.full((2, 196), 1 / 196)
    assert kept(uniform, 196) == [list(range(196))] * 2
    exponential = -torch.rand(200, 196, generator=draws()).log()
    share = sum(map(len, kept(exponential, 196))) / (200 * 196)
    assert share == pytest.approx(1 - 1 / math.e, abs=0.01)
    one_hot = torch.zeros(3, 9)
    one_hot[0, 0] = one_hot[1, 4] = one_hot[2, 8] = 1
    for options in ({}, {"rule": "nearest"}, {"mode": "official"}, {"mode": "random", "generator": draws()}):
        assert kept(one_hot, 9, **options) == [[0], [4], [8]]
    assert kept(torch.ones(1, 1), 5) == [[0]]
    assert kept(torch.ones(1, 1), 5, mode="official") == [[0]]
    assert kept(torch.zeros(1, 4), 5) == [[]]


def test_modes() -> None:
    scores = torch.rand(5, 20, generator=draws())
    assert kept(scores, 12) == kept(scores, 12)
    first = kept(scores, 12, mode="random", generator=draws(1))
    assert (
        first
        == kept(scores, 12, mode="random", generator=draws(1))
        != kept(scores, 12, mode="random", generator=draws(2))
    )
    order = torch.randperm(20, generator=draws(3))
    for row, moved in zip(kept(scores, 12, mode="official"), kept(scores[:, order], 12, mode="official"), strict=True):
        assert sorted(order[moved].tolist()) == row
    assert all(int(scores[n].argmin()) not in row for n, row in enumerate(kept(scores, 19, mode="official")))
    many = kept(scores, 10_000)
    assert many == [list(range(20))] * 5
    assert kept(scores.bfloat16(), 10_000) == many


def test_significance() -> None:
    attention = torch.randn(2, 3, 6, 6, generator=draws()).softmax(-1)
    values = torch.randn(2, 3, 6, 4, generator=draws(1))
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 4:] = False
    for norm in ("concat", "per_head"):
        scores = token_significance(attention, values, mask, norm)  # type: ignore[arg-type]
        assert scores.shape == (2, 5) and (scores >= 0).all() and not scores[1, 3:].any()
        torch.testing.assert_close(scores.sum(1), torch.ones(2))
        raw = []
        for j in range(1, 6):
            if norm == "concat":
                raw.append(sum(float(attention[0, h, 0, j]) for h in range(3)) * float(values[0, :, j].norm()))
            else:
                raw.append(sum(float(attention[0, h, 0, j] * values[0, h, j].norm()) for h in range(3)))
        torch.testing.assert_close(scores[0], torch.tensor(raw) / sum(raw))
    assert token_significance(attention.bfloat16(), values.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(
    ("scores", "points", "options", "message"),
    [
        (torch.ones(3), 2, {}, r"\(batch, tokens\)"),
        (torch.ones(1, 3), 0, {}, "num_points: got 0"),
        (torch.tensor([[1.0, math.nan]]), 2, {}, "NaN"),
        (torch.tensor([[1.0, -1.0]]), 2, {}, "below 0"),
        (torch.ones(1, 3), 2, {"mode": "gumbel"}, "mode"),
        (torch.ones(1, 3), 2, {"rule": "top"}, "rule"),
    ],
)
def test_bad_scores_are_named(scores: Tensor, points: int, options: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        inverse_transform_sample(scores, points, **options)  # type: ignore[arg-type]


def test_bad_attention_is_named() -> None:
    attention, values = torch.ones(1, 2, 3, 3), torch.ones(1, 2, 3, 4)
    for bad in ((attention[0], values, None), (attention, values[:, :1], None), (attention, values[:, :, :2], None)):
        with pytest.raises(InputError, match="values"):
            token_significance(*bad)
    with pytest.raises(InputError, match="mask"):
        token_significance(attention, values, torch.ones(1, 4))
    with pytest.raises(InputError, match="value_norm"):
        token_significance(attention, values, value_norm="sum")  # type: ignore[arg-type]
