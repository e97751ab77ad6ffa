"""Held-out samples never serve calibration."""

from __future__ import annotations

import pytest
import torch

from layerwright.data.demo_data import demo_data, digits


def test_the_parts_of_the_digits_are_disjoint_in_size_and_content() -> None:
    parts = {part: digits(part) for part in ("train", "calibration", "heldout")}  # type: ignore[arg-type]
    assert sum(len(x) for x, _ in parts.values()) == 1797
    for x, y in parts.values():
        assert x.shape[1:] == (1, 8, 8) and x.min() >= -1 and x.max() <= 1
        assert len(x) == len(y) and set(y.tolist()) == set(range(10))
    train, held = ({tuple(row) for row in parts[p][0].flatten(1).tolist()} for p in ("calibration", "heldout"))
    assert not train & held


@pytest.mark.parametrize(("name", "size"), [("demo:vit", 8), ("demo:cnn", 32)])
def test_images_have_the_size_that_the_model_takes(name: str, size: int) -> None:
    data = demo_data(name, None, samples=40)
    assert data.samples == 40
    assert all(batch["pixel_values"].shape[1:] == (1, size, size) for batch in data)
    assert all(torch.isfinite(batch["pixel_values"]).all() for batch in data)
