"""Codes of two regions: b bits for any input, an exact shift between the grids, a uniform grid at ratio 0."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from layerwright.core.errors import InputError
from layerwright.nn.activation import ActivationQuantizer, round_two_regions
from layerwright.nn.packing import word_columns
from layerwright.nn.two_regions import pack_regions, region_codes, region_values, unpack_regions

STEP = torch.tensor([0.03])


@settings(deadline=None)
@given(st.integers(3, 8), st.integers(0, 9), st.booleans(), st.integers(0, 5))
def test_codes_pack_to_b_bits_and_mean_what_is_rounded(bits: int, ratio: int, signed: bool, seed: int) -> None:
    x = torch.randn(3, 37, generator=torch.Generator().manual_seed(seed)) * 10 ** (seed - 2)
    x[0, :4] = torch.tensor([math.inf, -math.inf, 0.0, 1e30])
    codes = region_codes(x, STEP, bits, ratio, signed=signed)
    half = 1 << (bits - 1)
    assert codes.dtype == torch.int8 and -half <= int(codes.min()) and int(codes.max()) < half
    values = region_values(codes, STEP, bits, ratio, signed=signed)
    assert torch.equal(values, round_two_regions(x, STEP, bits, ratio, signed=signed))
    packed = pack_regions(x, STEP, bits, ratio, signed=signed)
    assert packed.shape == (3, word_columns(37, bits))
    assert torch.equal(unpack_regions(packed, 37, STEP, bits, ratio, signed=signed), values)
    # Infinities and what is far outside take the ends.
    assert values[0, 0] == values[0, 3] == (half - 1) * STEP * 2.0**ratio
    assert values[0, 1] == (-(half // 2) * STEP if signed else 0)
    assert torch.equal(region_codes(values, STEP, bits, ratio, signed=signed), codes) or ratio == 0


@settings(deadline=None)
@given(st.integers(3, 8), st.integers(1, 9), st.booleans())
def test_every_value_is_the_nearest_of_both_grids(bits: int, ratio: int, signed: bool) -> None:
    everything = torch.arange(-(1 << (bits - 1)), 1 << (bits - 1), dtype=torch.int8)
    grid = region_values(everything, STEP, bits, ratio, signed=signed)
    x = torch.linspace(-0.3, 1.2 * float(grid.max()), 301)
    nearest = grid[(x[:, None] - grid).abs().argmin(1)]
    got = region_values(region_codes(x, STEP, bits, ratio, signed=signed), STEP, bits, ratio, signed=signed)
    torch.testing.assert_close((x - got).abs(), (x - nearest).abs(), rtol=1e-4, atol=1e-6)
    # One shift by `ratio` aligns the two: each coarse value is a whole number of fine steps.
    shifted = torch.arange(1 << (bits - 1)) * 2.0**ratio
    assert torch.equal(STEP * 2.0**ratio / STEP, torch.tensor([2.0**ratio]))
    torch.testing.assert_close(grid[: 1 << (bits - 1)], shifted * STEP, rtol=1e-6, atol=0)


@pytest.mark.parametrize("signed", [False, True])
def test_ratio_zero_is_a_uniform_grid(signed: bool) -> None:
    x = torch.linspace(-2, 3, 401)
    bits, half = 5, 16
    low = -(half // 2) if signed else 0
    uniform = (x / STEP).round().clamp(low, half - 1) * STEP
    torch.testing.assert_close(round_two_regions(x, STEP, bits, 0, signed=signed), uniform)


def test_the_least_value_of_gelu_is_kept_where_the_fine_grid_covers_it() -> None:
    x = torch.linspace(-6, 6, 2001)
    y = F.gelu(x)
    for bits in (4, 6):
        fine = torch.tensor([0.17 / (1 << (bits - 2)) * 1.01])
        rounded = round_two_regions(y, fine, bits, 4, signed=True)
        place = int(y.argmin())
        assert abs(rounded[place] - y[place]) <= fine / 2 + 1e-7


def test_values_that_both_cover_take_the_fine_grid() -> None:
    quantizer = ActivationQuantizer(4, "two_region", ratio=3).set_(STEP)
    x = torch.linspace(0, 7 * 0.03, 57)
    assert float((quantizer(x) - x).abs().max()) <= 0.03 / 2 + 1e-7


def test_bad_input() -> None:
    for bits in (2, 9, True):
        with pytest.raises(InputError, match="expected 3 to 8"):
            region_codes(torch.zeros(1), STEP, bits, 1, signed=False)
    with pytest.raises(InputError, match="expected 3 to 8"):
        region_values(torch.zeros(1, dtype=torch.int8), STEP, 2, 1, signed=False)
