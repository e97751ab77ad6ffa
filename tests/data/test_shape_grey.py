from __future__ import annotations

import pytest
import torch

from layerwright.core.errors import InputError
from layerwright.data.shape_grey import CLASSES, SHAPES, _coverage, grey_scenes


def test_same_seed_same_images() -> None:
    images, labels = grey_scenes(300, seed=1)
    assert images.shape == (300, 1, 32, 32) and labels.shape == (300,)
    again = grey_scenes(300, seed=1)
    assert torch.equal(images, again[0]) and torch.equal(labels, again[1])
    assert not torch.equal(images, grey_scenes(300, seed=2)[0])
    assert torch.isfinite(images).all() and images.abs().max() < 5 and float(images.std()) == pytest.approx(1, abs=0.1)
    assert labels.bincount(minlength=CLASSES).min() > 20


@pytest.mark.parametrize("kind", range(len(SHAPES)))
@pytest.mark.parametrize("hollow", [0, 1])
def test_areas(kind: int, hollow: int) -> None:
    place = torch.arange(128) + 0.5
    y, x = place[:, None].expand(128, 128), place.expand(128, 128)
    one = torch.ones(1)
    radius = 40.0
    middle = torch.full((2, 1), 64.0)
    inside = _coverage(x, y, torch.tensor([kind]), torch.tensor([hollow]), middle, one * 0.3, one * radius, 4.0)[0]
    side = 3 * 0.55 * radius * 2 / 3**0.5
    solid = [
        torch.pi * radius**2,
        (1.6 * radius) ** 2,
        3**0.5 / 4 * side**2,
        2 * (2 * radius * 0.6 * radius) - (0.6 * radius) ** 2,
    ]
    line = 1.6 * 4.0
    inner = 0.55 * radius - line
    left = [
        torch.pi * (radius - line) ** 2,
        (1.6 * radius - 2 * line) ** 2,
        solid[2] * (inner / (0.55 * radius)) ** 2,
        2 * (2 * (radius - line)) * (0.6 * radius - 2 * line) - (0.6 * radius - 2 * line) ** 2,
    ]
    area = float(inside.sum())
    if hollow:
        assert area == pytest.approx(solid[kind] - left[kind], rel=0.02)
    else:
        assert area == pytest.approx(solid[kind], rel=0.02)


def test_the_class_is_the_large_shape() -> None:
    # Without noise a solid shape has one tone inside, and the largest flat area is that of the class's own shape.
    images, labels = grey_scenes(400, noise=0.0, seed=3)
    flat = torch.stack([(image - image.median()).abs().gt(1.0).float().mean() for image in images])
    solid, hollow = flat[labels % 2 == 0].mean(), flat[labels % 2 == 1].mean()
    assert solid > 1.3 * hollow
    assert flat[labels == 2].mean() > flat[labels == 4].mean()  # squares are larger than triangles


@pytest.mark.parametrize(("given", "words"), [({"count": 0}, "count"), ({"size": 8}, "size"), ({"noise": -1}, "noise")])
def test_bad_input(given: dict[str, int], words: str) -> None:
    with pytest.raises(InputError, match=words):
        grey_scenes(**({"count": 2} | given))  # type: ignore[arg-type]
