"""Numbers are written as people read them, and never crash the page."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerwright.report import numbers


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (999.6, "1.00 kB"),
        (6400, "6.40 kB"),
        (835_840, "836 kB"),
        (4_006_144, "4.01 MB"),
        (14.9e9, "14.9 GB"),
        (5e15, "5000 TB"),
        (None, "–"),
        (math.nan, "–"),
        (True, "–"),
        ("12", "–"),
    ],
)
def test_size(value, text):
    assert numbers.size(value) == text


def test_size_takes_the_unit_of_another():
    assert numbers.size(835_840, like=4_006_144) == "0.836 MB"
    assert numbers.size(4_006_144, like=4_006_144) == "4.01 MB"
    assert numbers.size(500, like=0) == "500 B"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.0938030037796125, "1.094"),
        (0.010898, "0.01090"),
        (2.21e-05, "2.2e-05"),
        (0, "0"),
        (-12345.6, "-12,346"),
        (math.inf, "–"),
    ],
)
def test_number(value, text):
    assert numbers.number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ([0.008027545, 0.014087933], "0.0080 to 0.0141"),
        ([-0.001, 0.02], "-0.0010 to 0.0200"),
        ([0, 0], "0 to 0"),
        ([120.4, 130.6], "120 to 131"),
        (None, "–"),
        ([1], "–"),
        ([math.nan, 1], "–"),
    ],
)
def test_interval(value, text):
    assert numbers.interval(value, 3) == text


def test_zero_milliseconds_were_not_measured():
    assert numbers.milliseconds(0.0) == "–"
    assert numbers.milliseconds(65.303) == "65.3 ms"


def test_shares():
    assert numbers.percent(0.9841) == "98.4 %"
    assert numbers.ratio(1, 4) == "0.25x"
    assert numbers.ratio(1, 0) == "–"
    assert numbers.count(1_292_894_208, "FLOP") == "1.29 GFLOP"


@given(st.one_of(st.none(), st.booleans(), st.text(), st.floats(), st.integers(-(10**15), 10**15)))
def test_nothing_breaks_them(value):
    for show in (numbers.size, numbers.number, numbers.count, numbers.milliseconds, numbers.percent):
        text = show(value)
        assert isinstance(text, str)
        assert text
        assert "nan" not in text
        assert "inf" not in text
    assert numbers.ratio(value, value)
    assert numbers.interval([value, value])


@given(st.floats(1, 1e14))
def test_sizes_read_back_within_half_a_percent(value):
    digits, unit = numbers.size(value).split()
    scale = 1000 ** ("B", "kB", "MB", "GB", "TB").index(unit)
    assert float(digits) * scale == pytest.approx(value, rel=0.006 if scale > 1 else 0.51)
