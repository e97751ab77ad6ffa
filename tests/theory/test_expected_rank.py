from __future__ import annotations

import pytest

from layerwright.core.errors import InputError
from layerwright.theory.expected_rank import ACTIVATIONS, expected_rank


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_a_wider_input_fills_more(activation: str) -> None:
    narrow, half, full = (expected_rank(d_in, 40, activation, 4, samples=400) for d_in in (4, 16, 40))
    assert narrow.nuclear < half.nuclear < full.nuclear <= 1
    assert narrow.deviation < 0.1
    if activation == "identity":
        assert narrow.largest_rank == 4 and narrow.precise_ratio == narrow.ratio == 0.1
        assert half.largest_rank == 16
    else:
        assert narrow.largest_rank > 4 and narrow.ratio <= narrow.precise_ratio


def test_known_values() -> None:
    """Of 96 outputs and 2048 inputs: a tenth of the singular values, all alike, have the ratio sqrt(0.1)."""
    identity, relu = expected_rank(10, 96, "identity", 3), expected_rank(10, 96, "relu", 3)
    assert identity.nuclear == pytest.approx((10 / 96) ** 0.5, abs=0.02)
    assert relu.nuclear == pytest.approx(0.65, abs=0.03)
    assert relu.ratio > 0.95


@pytest.mark.parametrize("layer", ["conv3x3", "bottleneck"])
def test_other_layers(layer: str) -> None:
    linear = expected_rank(4, 30, "identity", 2, layer=layer, samples=320)  # type: ignore[arg-type]
    bent = expected_rank(4, 30, "silu", 2, layer=layer, samples=320)  # type: ignore[arg-type]
    inner = {"conv3x3": 4 * 9, "bottleneck": 6 * 4}[layer]
    assert linear.largest_rank == min(30, inner)
    assert bent.nuclear != linear.nuclear
    again = expected_rank(4, 30, "silu", 2, layer=layer, samples=320)  # type: ignore[arg-type]
    assert again == bent
    assert expected_rank(4, 30, "silu", 2, layer=layer, samples=320, seed=1) != bent  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_in": 0}, "d_in"),
        ({"trials": 0}, "trials"),
        ({"activation": "tanhh"}, "activation"),
        ({"layer": "conv5x5"}, "layer"),
        ({"samples": 5}, "at least 8 samples"),
        ({"tol": 2.0}, "tol"),
    ],
)
def test_bad_input_is_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        expected_rank(**{"d_in": 4, "d_out": 8, **options})  # type: ignore[arg-type]
