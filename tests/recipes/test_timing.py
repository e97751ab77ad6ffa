"""Measured times of treated layers."""

from __future__ import annotations

import torch

from layerwright.core.layer import LayerRef
from layerwright.core.treatment import LowRank, Quantize
from layerwright.recipes.timing import measured_times


def test_ratios_scale_the_layers_own_time_and_are_measured_once_per_shape() -> None:
    ms = measured_times(64, torch.float32)
    a = LayerRef("a", "linear", "a.weight", (256, 512), layout="linear")
    b = LayerRef("b", "linear", "b.weight", (256, 512), layout="linear")
    first = ms(a, (Quantize(8),), 2.0)
    assert first > 0
    assert ms(b, (Quantize(8, method="mse"),), 4.0) == 2 * first


def test_a_thin_product_is_faster_on_many_rows() -> None:
    ms = measured_times(2048, torch.float32, repeats=7)
    ref = LayerRef("a", "linear", "a.weight", (768, 768), layout="linear")
    assert ms(ref, (LowRank(16),), 1.0) < 0.7


def test_convolutions_keep_their_time() -> None:
    ref = LayerRef("c", "conv", "c.weight", (8, 9), layout="conv")
    assert measured_times(8, torch.float32)(ref, (Quantize(4),), 3.0) == 3.0
