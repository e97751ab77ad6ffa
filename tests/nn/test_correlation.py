from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from layerwright.core.errors import InputError
from layerwright.nn.correlation import correlation_4d, correlation_6d, interpolate_4d, mutual_nn_filter
from layerwright.nn.gradient_histograms import GradientHistograms


def test_cosines_of_all_pairs() -> None:
    first, second = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 2, 3)
    corr = correlation_4d(first, second)
    assert corr.shape == (2, 3, 4, 2, 3)
    for place in ((0, 0, 0, 0, 0), (1, 2, 1, 1, 2)):
        batch, y, x, v, u = place
        expected = functional.cosine_similarity(first[batch, :, y, x], second[batch, :, v, u], dim=0)
        assert corr[place] == pytest.approx(float(expected), abs=1e-6)
    first[0, :, 1, 1] = 0
    assert (correlation_4d(first, second)[0, 1, 1] == 0).all(), "no features, no likeness"
    assert correlation_4d(first.bfloat16(), second.bfloat16()).dtype == torch.bfloat16


def test_resizing_keeps_corners_and_linear_functions() -> None:
    axes = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in (3, 4, 2, 5)), indexing="ij")
    fine = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in (6, 5, 7, 4)), indexing="ij")
    corr, expected = (g[0] + 2 * g[1] - g[2] + 0.5 * g[3] for g in (axes, fine))
    torch.testing.assert_close(interpolate_4d(corr[None], (6, 5), (7, 4))[0], expected)
    assert torch.equal(interpolate_4d(corr[None], (3, 4), (2, 5)), corr[None])
    random = torch.randn(1, 3, 3, 3, 3)
    up = interpolate_4d(random, (6, 6), (6, 6))
    assert up[0, 0, 5, 5, 0] == random[0, 0, 2, 2, 0]


def test_all_pairs_of_scales() -> None:
    torch.manual_seed(0)
    first, second = torch.randn(2, 6, 15, 12), torch.randn(2, 6, 10, 15)
    seen: list[tuple[int, ...]] = []
    convs = [nn.Conv2d(6, 4, 3, padding=1, bias=False) for _ in range(3)]
    for conv in convs:
        conv.register_forward_hook(lambda _m, given, _o: seen.append(tuple(given[0].shape[2:])))
    corr = correlation_6d(first, second, convs=convs)
    assert corr.shape == (2, 3, 3, 15, 12, 10, 15) and corr.min() >= 0 and corr.max() <= 1 + 1e-6
    assert seen == [(11, 8), (15, 12), (21, 17), (7, 11), (10, 15), (14, 21)]
    small = convs[0](functional.interpolate(first, (11, 8), mode="bilinear", align_corners=True))
    plain = convs[1](second)
    expected = interpolate_4d(correlation_4d(small, plain), (15, 12), (10, 15)).clamp_min(0)
    torch.testing.assert_close(corr[:, 0, 1], expected)
    torch.testing.assert_close(correlation_6d(first, first, (1.0,))[:, 0, 0], correlation_4d(first, first).clamp_min(0))


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 99), height=st.integers(1, 3), width=st.integers(1, 4))
def test_mutual_neighbours_keep_their_score_and_no_score_grows(seed: int, height: int, width: int) -> None:
    corr = torch.rand(2, height, width, 3, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    out = mutual_nn_filter(corr)
    flat, kept = corr.flatten(3).flatten(1, 2), out.flatten(3).flatten(1, 2)
    expected = flat * (flat / flat.amax(2, keepdim=True)) * (flat / flat.amax(1, keepdim=True))
    torch.testing.assert_close(kept, expected)
    best = (flat == flat.amax(2, keepdim=True)) & (flat == flat.amax(1, keepdim=True))
    torch.testing.assert_close(kept[best], flat[best])
    assert best.any() and (kept <= flat).all()


def test_a_filter_of_nothing_is_nothing() -> None:
    corr = torch.zeros(1, 2, 2, 2, 2)
    corr[0, 0, 0, 0, 0] = 2
    assert torch.equal(mutual_nn_filter(corr), corr)


def test_compiles_whole() -> None:
    def whole(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return mutual_nn_filter(correlation_6d(first, second, (0.5, 1.0)).amax((1, 2)))

    maps = torch.randn(1, 4, 5, 6)
    torch.testing.assert_close(torch.compile(whole, backend="eager", fullgraph=True)(maps, maps), whole(maps, maps))


def test_histograms_name_the_direction_of_a_slope() -> None:
    features, ramp = GradientHistograms(8, 8, (1,)), torch.linspace(0, 1, 64)
    for turn, image in enumerate((ramp.expand(64, 64), ramp[:, None].expand(64, 64))):
        picture = torch.zeros(1, 3, 64, 64)
        picture[..., 16:48, 16:48] = image[16:48, 16:48]
        maps = features(picture)
        assert maps.shape == (1, 8, 8, 8)
        assert maps[0, :, 3, 3].argmax() == 2 * turn
    noise = torch.rand(2, 3, 48, 64)
    maps = GradientHistograms()(noise)
    assert maps.shape == (2, 16, 6, 8) and maps.mean((2, 3)).abs().max() < 1e-6
    brighter = GradientHistograms()(0.5 * noise + 0.2)
    torch.testing.assert_close(brighter, maps, rtol=0.02, atol=1e-3)
    assert not list(features.parameters())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: correlation_4d(torch.zeros(1, 3, 2, 2), torch.zeros(1, 4, 2, 2)), "second: got batch and channels"),
        (lambda: correlation_4d(torch.zeros(1, 3, 2), torch.zeros(1, 3, 2, 2)), "first: got shape"),
        (lambda: correlation_4d(torch.zeros(0, 3, 2, 2), torch.zeros(0, 3, 2, 2)), "first: got shape"),
        (lambda: correlation_6d(torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 2, 2), ()), "scales"),
        (lambda: correlation_6d(torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 2, 2), (0.0,)), "scales"),
        (lambda: correlation_6d(torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 2, 2), (1.0,), []), "convs: got 0"),
        (lambda: interpolate_4d(torch.zeros(2, 2, 2, 2), (2, 2), (2, 2)), "corr: got shape"),
        (lambda: interpolate_4d(torch.zeros(1, 2, 2, 2, 2), (2, 0), (2, 2)), "first, second"),
        (lambda: mutual_nn_filter(torch.zeros(2, 2, 2)), "corr: got shape"),
        (lambda: GradientHistograms(0), "orientations"),
        (lambda: GradientHistograms()(torch.zeros(1, 3, 8, 8)), "images: got shape"),
    ],
)
def test_bad_input_is_named(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()
    with pytest.raises(TypeError, match="floating-point"):
        correlation_4d(torch.zeros(1, 3, 2, 2, dtype=torch.long), torch.zeros(1, 3, 2, 2))
