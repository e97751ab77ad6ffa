from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwright.allocate.equal_parameters import Shape, equal_flops_shapes, equal_parameter_shapes, shape_of
from layerwright.core.errors import BudgetError, InputError


def test_shapes_of_the_study() -> None:
    shapes = equal_parameter_shapes(385_000, [12, 3, 6], heads=4, tolerance=0.05)
    assert [(s.layers, s.dim, s.heads, s.params) for s in shapes] == [
        (3, 104, 4, 389_376),
        (6, 72, 4, 373_248),
        (12, 52, 4, 389_376),
    ]


def test_published_budget() -> None:
    # Base: 12 layers of 768; deeper ones of about 543 and 384.
    base = shape_of(12, 768)
    assert base.params == 84_934_656 and base.heads == 12 and base.ffn_dim == 3072
    shapes = equal_parameter_shapes(base.params, [12, 24, 48], multiple=64, tolerance=0.13)
    assert [(s.dim, s.heads) for s in shapes] == [(768, 12), (512, 8), (384, 6)]
    exact = equal_parameter_shapes(base.params, [24], head_dim=1, tolerance=0.001)
    assert exact[0].dim == 543


@settings(deadline=None, max_examples=60)
@given(st.floats(1e4, 1e9), st.integers(1, 60), st.sampled_from([1, 8, 16]), st.booleans(), st.floats(1, 6))
def test_no_other_width_comes_closer(params: float, layers: int, head_dim: int, gated: bool, ratio: float) -> None:
    shape = (
        equal_parameter_shapes(params, [layers], head_dim, tolerance=0.999, ffn_ratio=ratio, gated=gated, skip=False)[0]
        if _fits(params, layers, head_dim, gated, ratio)
        else None
    )
    if shape is None:
        return
    around = [n for n in (shape.dim - head_dim, shape.dim + head_dim) if n > 0]
    costs = [abs(shape_of(layers, n, head_dim=head_dim, ffn_ratio=ratio, gated=gated).params - params) for n in around]
    assert abs(shape.params - params) <= min(costs)


def _fits(params: float, layers: int, head_dim: int, gated: bool, ratio: float) -> bool:
    return shape_of(layers, head_dim, head_dim=head_dim, ffn_ratio=ratio, gated=gated).params < 1.9 * params


def test_gated_parts_have_as_many_weights() -> None:
    plain, gated = shape_of(4, 96, head_dim=16), shape_of(4, 96, head_dim=16, gated=True)
    assert gated.ffn_dim == 256 and gated.params == plain.params == 12 * 4 * 96**2


def test_equal_operations() -> None:
    reference = shape_of(6, 192, head_dim=16)
    flops = reference.flops_per_token(512)
    assert flops == 2 * reference.params + 4 * 6 * 512 * 192
    shapes = equal_flops_shapes(flops, [3, 6, 12, 24], 512, 4, tolerance=0.05)
    assert shapes[1].dim == 192
    for shape in shapes:
        assert shape.flops_per_token(512) == pytest.approx(flops, rel=0.05)
    # Attention is a larger part of deep shapes, which have fewer parameters left.
    assert [s.params for s in shapes] == sorted((s.params for s in shapes), reverse=True)
    assert reference.flops_per_token(512, causal=True) == 2 * reference.params + 2 * 6 * 512 * 192


def test_infeasible_depths_are_named_or_left_out() -> None:
    with pytest.raises(BudgetError, match=r"no width for 24x512 \(-11\.1%\).*feasible: 12x768, 48x384") as caught:
        equal_parameter_shapes(84_934_656, [12, 24, 48])
    assert "\n" not in str(caught.value)
    kept = equal_parameter_shapes(84_934_656, [12, 24, 48], skip=True)
    assert [s.name for s in kept] == ["12x768", "48x384"]
    with pytest.raises(BudgetError, match="feasible: none"):
        equal_parameter_shapes(1000, [12], skip=True)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"params": 0}, "params: got 0"),
        ({"params": float("nan")}, "params: got nan"),
        ({"depths": []}, "depths: got"),
        ({"depths": [2, 2]}, "each once"),
        ({"depths": [0]}, "depths: got"),
        ({"head_dim": 64, "multiple": 96}, "head_dim: 64 does not divide"),
        ({"head_dim": 0}, "does not divide"),
        ({"heads": 3, "multiple": 4}, "heads: 3 does not divide"),
        ({"tolerance": 1.0}, "tolerance: got 1.0"),
        ({"ffn_ratio": 0.0}, "ffn_ratio 0.0"),
    ],
)
def test_bad_input(given: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        equal_parameter_shapes(**({"params": 1e6, "depths": [4]} | given))  # type: ignore[arg-type]


def test_bad_shapes() -> None:
    with pytest.raises(InputError, match="head_dim: got 64 for a width of 96"):
        shape_of(4, 96)
    with pytest.raises(InputError, match="tokens: got 0"):
        equal_flops_shapes(1e6, [2], 0)
    assert Shape(2, 8, 1, 32).to_data()["params"] == 2 * 12 * 64
