"""Generated patches that look like ten kinds of land from above."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from layerwright.core.errors import InputError

__all__ = ["LAND_GROUPS", "LAND_USE", "land_use"]

LAND_USE = (
    "annual crop", "forest", "herbaceous vegetation", "highway", "industrial", "pasture", "permanent crop", "residential",
    "river", "sea or lake",
)  # fmt: skip
"""The classes of EuroSAT (Helber et al., 2019), in its order."""
LAND_GROUPS: Mapping[str, tuple[int, ...]] = {"vegetation": (0, 1, 2, 5, 6), "urban": (3, 4, 7), "water": (8, 9)}
"""The coarse groups of Sebastianelli et al. (2022)."""
_FULL = 64


def land_use(count: int, size: int = 64, noise: float = 0.1, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """`count` patches ``(count, 3, size, size)`` in 0..1 and their classes ``(count,)``, equally many of each, in random order.

    Stripes, dots, blobs, lines, rectangles, curves and slopes with random places, directions, periods and colours, drawn
    at 64 x 64 and averaged down to `size`. The same arguments give the same patches.

    Args:
        count: number of patches.
        size: height and width: 64, 32, 16 or 8.
        noise: standard deviation of what is added to each pixel of 64 x 64.
        seed: of everything random.

    Raises:
        InputError: an argument outside its range.
    """
    if count < 0:
        raise InputError(f"count: got {count}, expected at least 0")
    if size not in (64, 32, 16, 8):
        raise InputError(f"size: got {size}, expected 64, 32, 16 or 8 pixels")
    if noise < 0:
        raise InputError(f"noise: got {noise}, expected at least 0")
    draw = torch.Generator().manual_seed(seed)
    images, labels = [], []
    for label, name in enumerate(LAND_USE):
        share = count // len(LAND_USE) + (label < count % len(LAND_USE))
        patch = _Patches(share, draw)
        image = _FORMS[name](patch) + 0.05 * (patch.uniform(-1, 1, 3, 1, 1))
        image = (image + noise * torch.randn(image.shape, generator=draw)).clamp(0, 1)
        images.append(functional.avg_pool2d(image, _FULL // size) if share else image[:, :, :size, :size])
        labels += [label] * share
    order = torch.randperm(count, generator=draw)
    return torch.cat(images)[order], torch.tensor(labels, dtype=torch.long)[order]


class _Patches:
    """Random numbers and coordinates for `count` patches."""

    def __init__(self, count: int, draw: torch.Generator) -> None:
        self.count, self.draw = count, draw
        centre = torch.arange(_FULL) + 0.5
        self.rows, self.columns = centre[:, None], centre[None, :]

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """``(count, *shape)``."""
        return low + (high - low) * torch.rand(self.count, *shape, generator=self.draw)

    def along(self, turn: Tensor) -> Tensor:
        """Distance from a line through the middle at angle `turn` ``(count, 1, 1)``."""
        return (self.columns - _FULL / 2) * turn.sin() + (self.rows - _FULL / 2) * turn.cos()

    def blobs(self, scale: int) -> Tensor:
        """Smooth noise of mean 0 and deviation 1 with details of `scale` pixels, ``(count, 1, 64, 64)``."""
        coarse = torch.randn(self.count, 1, _FULL // scale + 3, _FULL // scale + 3, generator=self.draw)
        if not self.count:
            return torch.zeros(0, 1, _FULL, _FULL)
        wide = functional.interpolate(coarse, scale_factor=scale, mode="bicubic", align_corners=False)
        return wide[:, :, scale : scale + _FULL, scale : scale + _FULL] / 0.75

    def colour(self, red: float, green: float, blue: float, spread: float = 0.06) -> Tensor:
        """``(count, 3, 1, 1)`` around a colour."""
        return torch.tensor([red, green, blue])[:, None, None] + self.uniform(-spread, spread, 3, 1, 1)

    def boxes(self, number: int, low: float, high: float) -> Tensor:
        """Coverage ``(count, 1, 64, 64)`` by `number` rectangles with sides between `low` and `high` pixels."""
        cover = torch.zeros(self.count, 1, _FULL, _FULL)
        for _ in range(number):
            row, column = self.uniform(0, _FULL, 1, 1), self.uniform(0, _FULL, 1, 1)
            high_half, wide_half = self.uniform(low / 2, high / 2, 1, 1), self.uniform(low / 2, high / 2, 1, 1)
            inside = ((self.rows - row).abs() <= high_half) & ((self.columns - column).abs() <= wide_half)
            cover = torch.maximum(cover, inside[:, None].float() * self.uniform(0.7, 1, 1, 1, 1))
        return cover


def _mix(below: Tensor, above: Tensor, cover: Tensor) -> Tensor:
    return below * (1 - cover) + above * cover


def _fields(p: _Patches) -> Tensor:
    """Green or brown, with soft blobs."""
    green = p.uniform(0, 1, 1, 1, 1)
    base = _mix(p.colour(0.45, 0.38, 0.28), p.colour(0.3, 0.45, 0.25), green)
    return base + 0.04 * p.blobs(16)


def _annual_crop(p: _Patches) -> Tensor:
    place = p.along(p.uniform(0, math.pi, 1, 1)) / p.uniform(5, 10, 1, 1)
    stripes = (0.5 + 0.5 * torch.sin(2 * math.pi * (place + p.uniform(0, 1, 1, 1))))[:, None]
    return _mix(_fields(p), p.colour(0.5, 0.45, 0.3), 0.8 * stripes)


def _permanent_crop(p: _Patches) -> Tensor:
    turn, period = p.uniform(0, math.pi, 1, 1), p.uniform(6, 10, 1, 1)
    waves = [torch.sin(2 * math.pi * p.along(t) / period) for t in (turn, turn + math.pi / 2)]
    dots = (waves[0] * waves[1]).clamp_min(0)[:, None]
    return _mix(_fields(p), p.colour(0.15, 0.3, 0.15), 0.9 * dots)


def _forest(p: _Patches) -> Tensor:
    return p.colour(0.17, 0.3, 0.18) + 0.08 * p.blobs(2) + 0.03 * p.blobs(8)


def _herbaceous(p: _Patches) -> Tensor:
    return p.colour(0.35, 0.42, 0.27) + 0.08 * p.blobs(8) + 0.03 * p.blobs(2)


def _pasture(p: _Patches) -> Tensor:
    turn = p.uniform(0, math.pi, 1, 1)
    edge = (p.along(turn) - p.uniform(-15, 15, 1, 1)).abs()
    slope = (p.along(turn + 1) / _FULL)[:, None] * p.uniform(-0.15, 0.15, 1, 1, 1)
    hedge = (1.5 - edge).clamp(0, 1)[:, None] * (p.uniform(0, 1, 1, 1, 1) > 0.5)
    return _mix(p.colour(0.32, 0.47, 0.25) + 0.03 * p.blobs(16) + slope, p.colour(0.15, 0.25, 0.15), hedge)


def _highway(p: _Patches) -> Tensor:
    place = p.along(p.uniform(0, math.pi, 1, 1)) - p.uniform(-18, 18, 1, 1)
    half = p.uniform(3, 5, 1, 1)
    road = (half - place.abs()).clamp(0, 1)[:, None]
    middle = (1 - place.abs()).clamp(0, 1)[:, None]
    grey = _mix(p.colour(0.55, 0.55, 0.55), p.colour(0.3, 0.35, 0.28), middle)
    return _mix(_fields(p), grey, road)


def _industrial(p: _Patches) -> Tensor:
    return _mix(p.colour(0.42, 0.42, 0.42) + 0.05 * p.blobs(8), p.colour(0.78, 0.78, 0.8), p.boxes(5, 10, 24))


def _residential(p: _Patches) -> Tensor:
    ground = _mix(p.colour(0.42, 0.42, 0.4), p.colour(0.3, 0.4, 0.28), 0.5 + 0.3 * p.blobs(16).clamp(-1, 1))
    return _mix(ground, p.colour(0.6, 0.42, 0.36), p.boxes(40, 3, 7))


def _river(p: _Patches) -> Tensor:
    turn = p.uniform(0, math.pi, 1, 1)
    along = p.along(turn + math.pi / 2) / p.uniform(25, 50, 1, 1) + p.uniform(0, 1, 1, 1)
    bend = p.uniform(4, 10, 1, 1) * torch.sin(2 * math.pi * along)
    place = p.along(turn) - bend - p.uniform(-12, 12, 1, 1)
    water = ((p.uniform(3, 8, 1, 1) - place.abs()) / 1.5).clamp(0, 1)[:, None]
    return _mix(_fields(p), p.colour(0.15, 0.25, 0.4), water)


def _sea(p: _Patches) -> Tensor:
    slope = (p.along(p.uniform(0, math.pi, 1, 1)) / _FULL)[:, None] * p.uniform(0, 0.25, 1, 1, 1)
    return p.colour(0.13, 0.24, 0.38) + slope + 0.015 * p.blobs(4)


_FORMS: Mapping[str, Callable[[_Patches], Tensor]] = {
    "annual crop": _annual_crop,
    "forest": _forest,
    "herbaceous vegetation": _herbaceous,
    "highway": _highway,
    "industrial": _industrial,
    "pasture": _pasture,
    "permanent crop": _permanent_crop,
    "residential": _residential,
    "river": _river,
    "sea or lake": _sea,
}
