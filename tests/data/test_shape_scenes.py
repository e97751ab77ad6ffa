from __future__ import annotations

import math

import pytest
import torch

from layerwright.core.errors import InputError
from layerwright.data.shape_scenes import SHAPES, needle_scenes, shape_scenes, single_scenes


def test_boxes_masks_and_depths_agree() -> None:
    scenes = shape_scenes(40, 48, strokes=(0, 5), seed=3)
    several = 0
    for scene in range(len(scenes)):
        for place, label in enumerate(scenes.labels[scene].tolist()):
            mask = scenes.instance[scene] == place + 1
            if label < 0:
                assert not mask.any() and (scenes.boxes[scene, place] == -1).all()
                continue
            several += place
            assert mask.sum() >= 12
            rows, columns = mask.nonzero().unbind(1)
            box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert scenes.boxes[scene, place].tolist() == [int(side) for side in box]
            assert (scenes.semantic[scene][mask] == label + 1).all()
            assert (scenes.depth[scene][mask] == scenes.object_depths[scene, place]).all()
        background = scenes.instance[scene] == 0
        assert (scenes.semantic[scene][background] == 0).all()
        assert scenes.depth[scene][background].min() > 10
    assert several > 10
    assert scenes.images.shape == (40, 3, 48, 48)
    assert scenes.images.min() >= 0 and scenes.images.max() <= 1


def test_the_nearest_object_wins() -> None:
    scenes = shape_scenes(30, 32, objects=(4, 4), radius=(0.3, 0.4), seed=1)
    order = scenes.object_depths
    assert (order[:, :-1] >= order[:, 1:]).all(), "later objects are nearer and drawn over earlier ones"
    last = scenes.instance == 4
    alone = single_scenes(1, 32, seed=0)
    assert last.flatten(1).any(1).all() and alone.labels.shape == (1, 1)


@pytest.mark.parametrize(
    ("shape", "area"),
    [
        ("disc", math.pi),
        ("square", 2.25),
        ("triangle", 3 * math.sqrt(3) / 4),
        ("cross", 4 * 0.95 * 0.6 - 0.36),
        ("ring", math.pi * 0.75),
        ("star", 5 * 0.45 * math.sin(math.pi / 5)),
    ],
)
def test_areas_are_those_of_the_formulas(shape: str, area: float) -> None:
    scenes = single_scenes(24, 128, classes=(shape,), radius=(0.25, 0.25), seed=5)
    pixels = (scenes.instance > 0).sum((1, 2)).float().mean()
    assert float(pixels) == pytest.approx(area * 32**2, rel=0.02)


def test_the_seed_decides_and_classes_are_even() -> None:
    first, again, other = (single_scenes(300, 32, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, other.images)
    counts = first.first_labels.bincount(minlength=len(SHAPES))
    assert counts.min() > 25


def test_needles_are_small_and_strokes_vary() -> None:
    scenes = needle_scenes(60, 64, seed=2)
    share = (scenes.instance > 0).float().mean((1, 2))
    assert share.max() < 0.03
    assert scenes.strokes.min() < 4 and scenes.strokes.max() > 16
    assert len(scenes.select(scenes.strokes > 10)) == int((scenes.strokes > 10).sum())
    assert len(shape_scenes(0, 16)) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 8}, "size"),
        ({"classes": ("disc", "blob")}, "blob"),
        ({"classes": ()}, "classes"),
        ({"objects": (0, 2)}, "objects"),
        ({"strokes": (3, 1)}, "strokes"),
        ({"radius": (0.2, 0.1)}, "radius"),
        ({"noise": -1.0}, "noise"),
        ({"count": -1}, "count"),
        ({"size": 16, "radius": (0.05, 0.06)}, "fewer than 12 pixels"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        shape_scenes(**{"count": 2, **settings})  # type: ignore[arg-type]
