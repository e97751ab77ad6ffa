from __future__ import annotations

import math
from itertools import pairwise

import pytest

from layerwright.allocate.channel_search import ChannelSpace, mean_profile, search_channels
from layerwright.core.errors import BudgetError, InputError


def area(channels: list[int]) -> float:
    return 27 * channels[0] + sum(a * b for a, b in pairwise(channels))


def crookedness(channels: list[int]) -> float:
    """Largest distance from the straight line between the first and the last width, relative to the latter."""
    step = (channels[-1] - channels[0]) / (len(channels) - 1)
    return max(abs(width - channels[0] - step * place) for place, width in enumerate(channels)) / channels[-1]


def test_designs_cost_the_same_and_the_best_are_found() -> None:
    space = ChannelSpace(8, area, pieces=3)
    designs = search_channels(space, 2e4, lambda channels: -crookedness(channels), 80, seed=3)
    assert len(designs) == 80
    assert all(abs(design.cost / 2e4 - 1) <= 0.01 and design.cost == area(list(design.channels)) for design in designs)
    assert all(list(design.channels) == sorted(design.channels) for design in designs)
    values = [design.value for design in designs]
    assert values == sorted(values, reverse=True) and len(set(values)) > 60
    straight = [place / 7 for place in range(8)]

    def off(share: float) -> float:
        return max(abs(a - b) for a, b in zip(mean_profile(designs, share), straight, strict=True))

    assert off(0.1) < 0.08
    assert max(abs(a - b) for a, b in zip(designs[-1].profile, straight, strict=True)) > 0.3
    again = search_channels(space, 2e4, lambda channels: -crookedness(channels), 80, seed=3)
    assert again == designs
    assert search_channels(space, 2e4, lambda channels: 0.0, 1, seed=4)[0].channels != designs[0].channels


def test_profiles_run_from_zero_to_one_and_bend_where_they_may() -> None:
    for pieces in (1, 2, 5):
        for design in search_channels(ChannelSpace(6, area, pieces), 3e4, lambda _: 0.0, 10):
            assert design.profile[0] == 0 and design.profile[-1] == pytest.approx(1)
            steps = [b - a for a, b in pairwise(design.profile)]
            assert min(steps) >= 0
            assert sum(abs(a - b) > 1e-9 for a, b in pairwise(steps)) <= pieces - 1


def test_bad_input_is_named() -> None:
    space = ChannelSpace(4, area, pieces=2)
    with pytest.raises(InputError, match="n: got 0"):
        search_channels(space, 1e4, lambda _: 0.0, 0)
    with pytest.raises(InputError, match="evaluate: got nan"):
        search_channels(space, 1e4, lambda _: math.nan, 1)
    with pytest.raises(BudgetError, match="below the least cost"):
        search_channels(space, 10, lambda _: 0.0, 1)
    with pytest.raises(InputError, match="share"):
        mean_profile([], 0.1)
    for settings, message in (
        ({"depth": 1}, "depth"), ({"pieces": 4}, "pieces"), ({"first": (9.0, 8.0)}, "first"), ({"tolerance": 1.0}, "tolerance")
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            ChannelSpace(**{"depth": 4, "cost_fn": area, "pieces": 2, **settings})  # type: ignore[arg-type]
