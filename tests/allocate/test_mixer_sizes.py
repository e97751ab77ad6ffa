from __future__ import annotations

import pytest

from layerwright.allocate.mixer_sizes import effective_width, mixer_connections, optimal_mixer_sizes
from layerwright.core.errors import InputError


@pytest.mark.parametrize("connections", [2, 3, 16, 100, 1000, 8190, 8192, 30000])
@pytest.mark.parametrize("expansion", [None, 2.0])
def test_no_pair_of_numbers_is_wider(connections: int, expansion: float | None) -> None:
    limit = connections * (1 if expansion is None else 4)
    found = optimal_mixer_sizes(limit, expansion)
    assert mixer_connections(*found, expansion) <= limit
    widest = max(
        s * c
        for s in range(1, 130)
        for c in range(s, 130)
        if mixer_connections(s, c, expansion) <= limit and s * c <= 130 * 130
    )
    assert effective_width(*found) >= widest


def test_equal_sizes_and_too_few_connections() -> None:
    assert optimal_mixer_sizes(8192) == (16, 16)
    assert mixer_connections(16, 16) == 8192 and mixer_connections(16, 16, 4) == 8 * 8192
    with pytest.raises(InputError, match="at least 2"):
        optimal_mixer_sizes(1)
