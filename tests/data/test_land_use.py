from __future__ import annotations

import pytest
import torch

from layerwright.core.errors import InputError
from layerwright.data.land_use import LAND_GROUPS, LAND_USE, land_use


def test_patches_repeat_and_are_balanced() -> None:
    images, labels = land_use(34, 32, seed=1)
    assert images.shape == (34, 3, 32, 32) and images.dtype == torch.float32
    assert float(images.min()) >= 0 and float(images.max()) <= 1
    assert sorted(labels.bincount().tolist()) == [3] * 6 + [4] * 4
    again, other = land_use(34, 32, seed=1), land_use(34, 32, seed=2)
    assert torch.equal(again[0], images) and torch.equal(again[1], labels)
    assert not torch.equal(other[0], images)
    assert land_use(0)[0].shape == (0, 3, 64, 64) and len(land_use(3)[1]) == 3
    assert len(set(LAND_USE)) == 10 and set(LAND_GROUPS) == {"vegetation", "urban", "water"}


def test_smaller_patches_are_means_of_large_ones() -> None:
    large, small = land_use(10, 64, seed=3)[0], land_use(10, 16, seed=3)[0]
    torch.testing.assert_close(torch.nn.functional.avg_pool2d(large, 4), small)


def test_classes_look_like_what_they_are_called() -> None:
    images, labels = land_use(200, 64, 0.0, seed=4)
    means = {name: images[labels == number].mean((0, 2, 3)) for number, name in enumerate(LAND_USE)}
    assert means["sea or lake"].argmax() == 2
    assert all(means[name].argmax() == 1 for name in ("forest", "pasture", "herbaceous vegetation"))
    rough = {
        name: float((images[labels == number][..., 1:] - images[labels == number][..., :-1]).abs().mean())
        for number, name in enumerate(LAND_USE)
    }
    assert rough["forest"] > 3 * rough["pasture"] and rough["forest"] > 3 * rough["sea or lake"]
    river = images[labels == LAND_USE.index("river")]
    blue = (river[:, 2] > river[:, 1]).float().mean((1, 2))
    assert 0.05 < float(blue.mean()) < 0.5
    # A road is a straight bright line: brighter than its field along a share of the pixels.
    road = images[labels == LAND_USE.index("highway")].mean(1)
    assert float((road > 0.48).float().mean()) > 0.03


def test_bad_input() -> None:
    for arguments, message in (((-1,), "count"), ((5, 60), "size: got 60"), ((5, 64, -0.1), "noise")):
        with pytest.raises(InputError, match=message):
            land_use(*arguments)
