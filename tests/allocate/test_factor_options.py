from __future__ import annotations

import pytest

from layerwright.allocate.factor_options import enumerate_factorizations
from layerwright.core.conv_factors import ConvShape, largest_rank
from layerwright.core.errors import InputError
from layerwright.core.treatment import FactorConv

SHAPE = ConvShape(32, 48, (3, 3), (2, 2), (16, 16), (8, 8))


def test_candidates_of_a_convolution() -> None:
    options = enumerate_factorizations(SHAPE)
    assert options[-1].treatments == () and options[-1].macs == SHAPE.macs and options[-1].code == (-1, -1, -1, -1)
    factors = [option.treatments[0] for option in options[:-1]]
    assert {(f.method, f.scheme, f.groups) for f in factors if isinstance(f, FactorConv)} == {
        ("svd", 2, 1), ("svd", 4, 1), ("svd", 4, 32), ("svd", 5, 1), ("svd", 5, 48), ("cp", 4, 1),
    }  # fmt: skip
    for option in options[:-1]:
        factor = option.treatments[0]
        assert isinstance(factor, FactorConv)
        assert option.macs <= SHAPE.macs
        assert 1 <= factor.inner <= largest_rank(factor, 48, 32)
        first = 1.0 if factor.method == "cp" else 0.0
        assert option.code[0] == first and factor.inner in option.code
    # Within one decomposition ranks rise, and the aims of 0.3 to 0.7 are covered.
    plain = [o for o, f in zip(options, factors, strict=False) if isinstance(f, FactorConv) and f.scheme == 2]
    shares = [option.macs / SHAPE.macs for option in plain]
    assert shares == sorted(shares) and shares[0] <= 0.33 and shares[-1] >= 0.66


def test_settings() -> None:
    only = enumerate_factorizations(SHAPE, (0.5,), ("svd",), groups=(1, 2, 5))
    found = {(f.scheme, f.groups) for o in only[:-1] if isinstance(f := o.treatments[0], FactorConv)}
    assert found <= {(2, 1), (4, 1), (4, 2), (5, 1), (5, 2)} and (4, 2) in found
    assert all(o.treatments[0].method == "cp" for o in enumerate_factorizations(SHAPE, methods=("cp",))[:-1])  # type: ignore[attr-defined]
    pointwise = enumerate_factorizations(ConvShape(32, 48, (1, 1), (1, 1), (8, 8), (8, 8)))
    schemes = {f.scheme for o in pointwise[:-1] if isinstance(f := o.treatments[0], FactorConv)}
    assert schemes <= {4, 5}


@pytest.mark.parametrize(
    ("shape", "arguments", "words"),
    [
        (ConvShape(32, 48, (3, 3), (1, 1), (8, 8), (8, 8), groups=2), {}, "groups"),
        (ConvShape(32, 48, (3, 3), (1, 1), (8, 8), (0, 0)), {}, "sizes"),
        (SHAPE, {"methods": ("tucker",)}, "methods"),
        (SHAPE, {"ratios": (0.5, 0.0)}, "ratios"),
        (SHAPE, {"ratios": ()}, "ratios"),
    ],
)
def test_bad_input_names_the_layer(shape: ConvShape, arguments: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        enumerate_factorizations(shape, **arguments, name="stage.1.conv")  # type: ignore[arg-type]
    assert "stage.1.conv" in str(caught.value)
