from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from layerwright.core.errors import InputError
from layerwright.data.warp_pairs import FAMILIES, Family, WarpPairs, warp_pairs, warp_sources

# The package has a function of that name.
module = import_module("layerwright.data.warp_pairs")


def _smooth(side: int = 96, count: int = 2) -> list[torch.Tensor]:
    """Pictures without noise or sharp edges, so that reading between pixels is exact to a few thousandths."""
    y, x = torch.meshgrid(*[torch.arange(side) * (6.28 / side)] * 2, indexing="ij")
    waves = [torch.sin(2 * x + k) * torch.cos(3 * y - k) for k in range(3 * count)]
    return list((0.5 + 0.4 * torch.stack(waves)).view(count, 3, side, side))


def _at(images: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Colours ``(pairs, 3, points)`` of pictures at points."""
    grid = points[:, None] * (2 / images.shape[-1]) - 1
    return functional.grid_sample(images, grid, align_corners=False)[:, :, 0]


@pytest.mark.parametrize("family", FAMILIES)
def test_target_points_show_what_source_points_show(family: Family) -> None:
    pairs = warp_pairs(12, 48, family, pictures=_smooth(), points=10, jitter=0, noise=0, seed=2)
    assert pairs.source.shape == pairs.target.shape == (12, 3, 48, 48)
    assert pairs.source_points.shape == pairs.target_points.shape == (12, 10, 2)
    inner = pairs.valid & ((pairs.target_points > 2) & (pairs.target_points < 46)).all(-1)
    gap = (_at(pairs.source, pairs.source_points) - _at(pairs.target, pairs.target_points)).abs().amax(1)
    assert inner.sum() > 80 and gap[inner].max() < 0.02
    still = (_at(pairs.source, pairs.source_points) - _at(pairs.target, pairs.source_points)).abs().amax(1)
    assert still[inner].mean() > 10 * gap[inner].mean(), "not because all of it looks alike"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_map_has_its_inverse(family: Family) -> None:
    warp = warp_pairs(30, 64, family, pictures=_smooth(), seed=4).warp
    points = 64 * torch.rand(30, 50, 2)
    assert (warp.inverse(warp(points)) - points).abs().max() < 1e-3
    assert (warp(warp.inverse(points)) - points).abs().max() < 2e-3
    assert (warp(points) - points).abs().mean() > 3


def test_the_spline_bends_and_goes_where_it_should() -> None:
    moves = 0.2 * torch.rand(3, 9, 2) - 0.1
    bend = module._spline(moves)
    warp = module.Warp(torch.eye(3).repeat(3, 1, 1), bend, 64)
    control = (module._CONTROL + 1) * 32
    moved = warp(control.expand(3, -1, -1))
    torch.testing.assert_close(moved, control + 32 * moves, rtol=0, atol=1e-3)
    middle = (warp(control[None, :1].expand(3, -1, -1)) + warp(control[None, 2:3].expand(3, -1, -1))) / 2
    assert (warp(control[None, 1:2].expand(3, -1, -1)) - middle).abs().max() > 0.1


def test_scale_is_the_local_enlargement() -> None:
    pairs = warp_pairs(40, 64, scale=(0.5, 2.0), pictures=_smooth(), seed=6)
    centre = torch.full((40, 1, 2), 32.0)
    steps = torch.tensor([[[0.5, 0.0]], [[0.0, 0.5]]])
    columns = [(pairs.warp(centre + step) - pairs.warp(centre - step))[:, 0] for step in steps]
    area = columns[0][:, 0] * columns[1][:, 1] - columns[0][:, 1] * columns[1][:, 0]
    torch.testing.assert_close(area.sqrt(), pairs.scale, rtol=1e-3, atol=1e-3)
    assert pairs.scale.min() < 0.7 < 1.4 < pairs.scale.max()


def test_colours_and_noise_change_the_target_alone() -> None:
    plain, changed = (
        warp_pairs(6, 48, pictures=_smooth(), jitter=j, noise=n, seed=3) for j, n in ((0, 0), (0.3, 0.05))
    )
    assert torch.equal(plain.source, changed.source) and torch.equal(plain.source_points, changed.source_points)
    assert (plain.target - changed.target).abs().mean() > 0.05
    assert changed.target.min() >= 0 and changed.target.max() <= 1


def test_points_lie_where_there_is_detail_and_validity_is_known() -> None:
    picture = torch.full((3, 96, 96), 0.5)
    picture[:, 40:56, 40:56] = torch.rand(16, 16)
    pairs = warp_pairs(20, 48, pictures=[picture], points=6, seed=1)
    near = _at((pairs.source - 0.5).abs(), pairs.source_points).amax(1) > 0
    assert near.float().mean() > 0.5
    far = warp_pairs(20, 48, pictures=_smooth(), points=40, scale=(3.0, 3.0), seed=1)
    inside = ((far.target_points >= 0) & (far.target_points <= 48)).all(-1)
    assert torch.equal(far.valid, inside) and 0 < inside.float().mean() < 1


def test_the_seed_decides_and_pairs_can_be_chosen() -> None:
    one, again, other = (warp_pairs(5, 32, pictures=_smooth(), seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.target, again.target) and not torch.equal(one.target, other.target)
    some = one.select(torch.tensor([3, 1]))
    assert isinstance(some, WarpPairs) and len(some) == 2
    assert torch.equal(some.target[0], one.target[3])
    torch.testing.assert_close(some.warp(some.source_points), one.target_points[[3, 1]])


def test_train_and_test_share_no_picture() -> None:
    train, test = (warp_sources(part, 2) for part in ("train", "test"))  # type: ignore[arg-type]
    assert train[0].shape == test[0].shape == (3, 427, 640) and len(train) == len(test) == 4
    assert train[0].min() >= 0 and train[0].max() <= 1
    assert not any(a.shape == b.shape and torch.equal(a, b) for a in train for b in test)
    pairs = warp_pairs(3, 32, pictures=test, seed=0)
    assert pairs.source.std() > 0.05


def test_missing_photographs_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jpg"):
        module._photograph(tmp_path / "nowhere.jpg")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 0}, "count"),
        ({"size": 8}, "size"),
        ({"family": "rubber"}, "unknown family"),
        ({"points": 0}, "points"),
        ({"scale": (0.0, 1.0)}, "scale"),
        ({"scale": (2.0, 1.0)}, "scale"),
        ({"shift": 0.5}, "shift"),
        ({"rotation": -1}, "rotation"),
        ({"noise": -1}, "noise"),
        ({"jitter": -1}, "jitter"),
        ({"pictures": []}, "pictures: got none"),
        ({"pictures": [torch.zeros(1, 40, 40)]}, "pictures: got"),
        ({"pictures": None, "part": "other"}, "unknown part"),
    ],
)
def test_bad_input_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        warp_pairs(**{"count": 1, "size": 32, "pictures": _smooth(), **settings})
