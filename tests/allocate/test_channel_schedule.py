from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.oracles.rexnet import widths

from layerwright.allocate.channel_schedule import (
    divisible,
    fit_channels_to_budget,
    linear_channels,
    sloped_channels,
    stagewise_channels,
)
from layerwright.core.errors import BudgetError, InputError

REXNET = [16, 27, 38, 50, 61, 72, 84, 95, 106, 117, 128, 140, 151, 162, 174, 185]
LITE = [16, 32, 40, 48, 64, 72, 80, 96, 104, 112, 128, 136, 144, 160, 168, 184]


def area(channels: list[int]) -> float:
    """Parameters of a chain of 1 x 1 convolutions, and a bit for the stem."""
    return 27 * channels[0] + sum(a * b for a, b in pairwise(channels))


def test_published_widths() -> None:
    assert linear_channels(16, 16, 184.75) == sloped_channels(16, 16, 180 / 16) == REXNET
    assert linear_channels(16, 16, 180, divisor=8) == sloped_channels(16, 16, 164 / 15, divisor=8) == LITE
    assert sloped_channels(16, 16, 180 / 16, 0.9)[0] == 16


@pytest.mark.parametrize("multiplier", [0.5, 0.9, 1.0, 1.3, 1.5, 2.0, 2.2, 3.0])
def test_rounding_is_that_of_the_published_loop(multiplier: float) -> None:
    assert sloped_channels(16, 16, 180 / 16, multiplier) == widths(16, 180 / 16, multiplier)


def test_stages_and_divisors() -> None:
    assert stagewise_channels([1, 2, 3], 10) == [10, 20, 20, 40, 40, 40]
    assert stagewise_channels([2, 1], 10, growth=1.5, multiplier=2) == [20, 20, 30]
    assert stagewise_channels([1], 10) == [10]
    assert [divisible(n, 8) for n in (1, 11, 12, 20, 60)] == [8, 16, 16, 24, 64]
    assert divisible(11, None) == 11
    assert linear_channels(2, 10, 10) == [10, 10]


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["linear", "stagewise"]),
    depth=st.integers(4, 20),
    first=st.floats(1, 20),
    times=st.floats(1.5, 60),
)
def test_the_budget_is_met_to_a_percent(kind: str, depth: int, first: float, times: float) -> None:
    budget = times * area([40] * depth)
    channels = fit_channels_to_budget(kind, depth, budget, area, first=first)  # type: ignore[arg-type]
    assert abs(area(channels) / budget - 1) <= 0.01
    assert len(channels) == depth and channels == sorted(channels)
    if kind == "linear":
        assert channels[0] == round(first)
        steps = [b - a for a, b in pairwise(channels)]
        assert max(steps) - min(steps) <= 2


def test_constant_widths_and_parts() -> None:
    assert fit_channels_to_budget("constant", 5, area([31] * 5), area) == [31] * 5
    assert fit_channels_to_budget("stagewise", 5, area([8, 8, 16, 16, 16]), area, repeats=(2, 3)) == [8, 8, 16, 16, 16]
    found = fit_channels_to_budget("linear", 6, 9e4, area, divisor=8, tolerance=0.2)
    assert all(width % 8 == 0 for width in found)


def test_budgets_that_cannot_be_met() -> None:
    with pytest.raises(BudgetError, match=r"below the least cost 1712 of \[16, 16, 16, 16, 16, 16\]"):
        fit_channels_to_budget("linear", 6, 100, area)
    with pytest.raises(BudgetError, match=r"nearest costs are 58 and 90; raise"):
        fit_channels_to_budget("constant", 2, 80, area)
    with pytest.raises(BudgetError, match="not reached"):
        fit_channels_to_budget("constant", 2, 1e9, lambda _: 1.0)
    with pytest.raises(BudgetError, match="positive"):
        fit_channels_to_budget("constant", 2, 0, area)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: linear_channels(1, 8, 16), "depth"),
        (lambda: linear_channels(4, 8, 7), "last"),
        (lambda: linear_channels(4, 0, 7), "first"),
        (lambda: linear_channels(4, 1, 7, multiplier=0), "multiplier"),
        (lambda: linear_channels(4, 1, 7, divisor=0), "divisor"),
        (lambda: sloped_channels(4, 1, -1), "slope"),
        (lambda: stagewise_channels([], 8), "repeats"),
        (lambda: stagewise_channels([2, 0], 8), "repeats"),
        (lambda: stagewise_channels([2, 2], 8, growth=0.5), "growth"),
        (lambda: fit_channels_to_budget("cubic", 4, 9e4, area), "kind"),  # type: ignore[arg-type]
        (lambda: fit_channels_to_budget("linear", 4, 9e4, area, tolerance=0), "tolerance"),
        (lambda: fit_channels_to_budget("stagewise", 4, 9e4, area, repeats=(1, 2)), "3 blocks, expected 4"),
    ],
)
def test_bad_numbers_are_named(call: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()  # type: ignore[operator]
