from __future__ import annotations

import pytest

from layerwright.models.backbone import Backbone, count_macs
from layerwright.models.published import Published, build, published


@pytest.mark.parametrize("variant", published(), ids=lambda variant: f"{variant.name} {variant.size}")
def test_parameters_and_operations_are_those_of_the_authors_code(variant: Published) -> None:
    model = build(variant)
    assert sum(p.numel() for p in model.parameters()) == variant.parameters
    assert isinstance(model, Backbone)
    if variant.gmacs is not None:
        assert count_macs(model, variant.size, variant.channels) / 1e9 == pytest.approx(variant.gmacs, rel=5e-3)
