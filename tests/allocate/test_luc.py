from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerwright.allocate.luc import LayerCompression, luc, luc_bits, luc_sparsity, reachable_sparsity
from layerwright.core.errors import InputError
from oracles.luc import linear_sparsity

SENSITIVITIES = st.lists(st.floats(0, 100, width=32), min_size=1, max_size=12)


def named(values: list[float]) -> dict[str, float]:
    return {f"layers.{i}": value for i, value in enumerate(values)}


@given(SENSITIVITIES, st.floats(0, 1))
def test_sparsity_has_the_mean_and_falls_with_sensitivity(values: list[float], share: float) -> None:
    scores = named(values)
    mean = share * reachable_sparsity(scores)
    found = luc_sparsity(scores, mean)
    assert math.fsum(found.values()) / len(found) == pytest.approx(mean, abs=1e-9)
    assert all(0 <= value <= 0.95 + 1e-12 for value in found.values())
    ordered = sorted(scores, key=scores.__getitem__)
    assert all(found[a] >= found[b] - 1e-12 for a, b in itertools.pairwise(ordered))


@given(SENSITIVITIES, st.floats(0.01, 0.99), st.floats(0.3, 0.95))
def test_sparsity_equals_bisection(values: list[float], share: float, most: float) -> None:
    scores = named([round(value, 3) for value in values])
    mean = share * reachable_sparsity(scores, most)
    found = luc_sparsity(scores, mean, most)
    assert list(found.values()) == pytest.approx(linear_sparsity(list(scores.values()), mean, most), abs=1e-6)


def test_the_rule_written_out() -> None:
    assert luc_sparsity(named([1.0, 2.0, 3.0]), 0.3) == pytest.approx(named([0.6, 0.3, 0.0]))
    # 0.5 * 3 * (1, 0.9, 0) / 1.9 would be 0.79 and 0.71; cut to 0.75 the first hands 0.04 on to the second.
    assert luc_sparsity(named([0.0, 0.1, 1.0]), 0.5, 0.75) == pytest.approx(named([0.75, 0.75, 0.0]))
    assert luc_sparsity(named([0.0, 0.5, 1.0]), 0.45, 0.8) == pytest.approx(named([0.8, 0.55, 0.0]))


def test_equal_layers_get_the_mean_and_the_most_sensitive_gets_none() -> None:
    assert luc_sparsity(named([2.0, 2.0, 2.0]), 0.4) == named([0.4, 0.4, 0.4])
    assert luc_sparsity(named([5.0, 1.0, 2.0]), 0.4)["layers.0"] == 0


@given(SENSITIVITIES)
def test_bits_double_above_the_mean(values: list[float]) -> None:
    scores = named(values)
    found = luc_bits(scores, 4)
    mean = math.fsum(values) / len(values)
    assert all(found[path] == (4 if value <= mean else 8) for path, value in scores.items())


def test_both_rules_together() -> None:
    found = luc(named([1.0, 2.0, 3.0]), named([9.0, 1.0, 1.0]), base_bits=3, sparsity=0.3)
    assert found["layers.0"] == LayerCompression(6, pytest.approx(0.6))
    assert [own.bits for own in found.values()] == [6, 3, 3]


@pytest.mark.parametrize("base", [1, 5, 7, 9, 16, True, "4"])
def test_bits_outside_the_widths_are_refused(base: object) -> None:
    with pytest.raises(InputError, match="base"):
        luc_bits(named([1.0]), base)  # type: ignore[arg-type]


@pytest.mark.parametrize("mean", [-0.1, 1.0, 1.5])
def test_sparsity_outside_its_range_is_refused(mean: float) -> None:
    with pytest.raises(InputError, match="sparsity"):
        luc_sparsity(named([1.0, 2.0]), mean)


def test_a_mean_that_cannot_be_reached_names_the_largest() -> None:
    with pytest.raises(InputError, match=r"largest mean is 0\.475"):
        luc_sparsity(named([1.0, 2.0]), 0.5)
    with pytest.raises(InputError, match="max_sparsity"):
        luc_sparsity(named([1.0, 1.0]), 0.5, 0.4)


def test_sensitivities_must_be_numbers_of_the_same_layers() -> None:
    with pytest.raises(InputError, match=r"layers\.0 is nan"):
        luc_sparsity(named([math.nan, 1.0]), 0.1)
    with pytest.raises(InputError, match="got none"):
        luc_bits({})
    with pytest.raises(InputError, match="one of the two only"):
        luc({"a": 1.0}, {"b": 1.0})
