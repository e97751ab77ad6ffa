from __future__ import annotations

import pytest
import torch

from layerwright.allocate.activation_strategy import fptq_strategy
from layerwright.core.errors import InputError


def test_two_bounds_choose_the_strategy() -> None:
    ranges = {"o": 2.0, "edge": 15.0, "q": torch.tensor([1.0, 40.0]), "k": 149.0, "down": 150.0, "fc2": 900.0}
    assert fptq_strategy(ranges) == {
        "o": "static", "edge": "static", "q": "lae", "k": "lae", "down": "dynamic", "fc2": "dynamic",
    }  # fmt: skip
    assert fptq_strategy({"q": 5.0, "k": 7.0}, 5.0, 6.0) == {"q": "static", "k": "dynamic"}


def test_inputs_that_cannot_be_equalized_are_rounded_for_each_token() -> None:
    ranges = {"q": 40.0, "o": 40.0, "v": 3.0}
    assert fptq_strategy(ranges, equalizable={"q"}) == {"q": "lae", "o": "dynamic", "v": "static"}
    assert set(fptq_strategy(ranges, equalizable=()).values()) == {"dynamic", "static"}


def test_layers_never_reached_are_dynamic_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="never reached by the calibration data, rounded for each token: expert"):
        chosen = fptq_strategy({"q": 1.0}, layers=["q", "expert"])
    assert chosen == {"q": "static", "expert": "dynamic"}


@pytest.mark.parametrize(("v0", "v1"), [(15.0, 15.0), (150.0, 15.0), (-1.0, 5.0), (float("nan"), 5.0)])
def test_bad_bounds(v0: float, v1: float) -> None:
    with pytest.raises(InputError, match="v0, v1: got"):
        fptq_strategy({"q": 1.0}, v0, v1)


def test_bad_ranges() -> None:
    with pytest.raises(InputError, match="q: its range is nan"):
        fptq_strategy({"q": torch.tensor([1.0, float("nan")])})
    with pytest.raises(InputError, match="q: its range is inf"):
        fptq_strategy({"q": float("inf")})
    with pytest.raises(InputError, match="no layers"):
        fptq_strategy({})
