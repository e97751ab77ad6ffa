"""Grey images by code: one to four shapes on a texture, with noise; the largest shape and its fill are the class."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from layerwright.core.errors import InputError

__all__ = ["CLASSES", "FILLS", "SHAPES", "grey_scenes"]

SHAPES = ("disk", "square", "triangle", "cross")
FILLS = ("solid", "hollow")
CLASSES = len(SHAPES) * len(FILLS)
"""Class ``2 shape + fill``."""
_CHUNK = 128
"""Scenes that are drawn together: their distances stay in the cache."""
_SCALE = 0.35
"""Standard deviation of the scenes before they are divided by it."""
_EDGE = 1.6
"""Half the width of a hollow shape's line, in pixels of an image of 32."""


def grey_scenes(count: int, *, size: int = 32, noise: float = 0.03, seed: int = 0) -> tuple[Tensor, Tensor]:
    """`count` images ``(count, 1, size, size)`` around 0, and the classes ``(count,)`` of their largest shapes.

    A scene is light that falls off to a side and a weak texture (two waves), up to three small shapes of any kind, the
    large shape over them (turned, moved, light or dark), and white noise. Edges are smooth over a pixel; the standard
    deviation of all pixels is about 1. Same seed, same images.

    Args:
        count: at least 1.
        size: side in pixels, at least 16.
        noise: standard deviation before the images are divided by 0.35; shapes are 0.5 to 1 from the middle grey.
        seed: of everything random.

    Raises:
        InputError: a number outside its range.
    """
    for name, value, low in (("count", count, 1), ("size", size, 16), ("noise", noise, 0)):
        if value < low:
            raise InputError(f"{name}: got {value}, expected at least {low}")
    draw = torch.Generator().manual_seed(seed)
    parts = [_scenes(min(_CHUNK, count - first), size, noise, draw) for first in range(0, count, _CHUNK)]
    images, labels = zip(*parts, strict=True)
    return torch.cat(images), torch.cat(labels)


def _scenes(count: int, size: int, noise: float, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=draw)

    place = torch.arange(size) + 0.5
    y, x = place[:, None].expand(size, size), place.expand(size, size)
    unit = size / 32
    image = torch.zeros(count, size, size)
    for strength, low, high in ((0.3, 0.04, 0.1), (0.08, 0.1, 0.3)):  # light from a side, and a texture
        angle, phase = uniform(0, math.pi, count, 1, 1), uniform(0, 2 * math.pi, count, 1, 1)
        wave = (angle.cos() * x + angle.sin() * y) / unit * uniform(low, high, count, 1, 1)
        image += strength * uniform(0.5, 1.5, count, 1, 1) * (wave + phase).sin()
    small = torch.randint(4, (count,), generator=draw)
    labels = torch.randint(CLASSES, (count,), generator=draw)
    for number in range(4):
        last = number == 3
        drawn = torch.ones(count, dtype=torch.bool) if last else small > number
        kind = labels // 2 if last else torch.randint(len(SHAPES), (count,), generator=draw)
        hollow = labels % 2 if last else torch.randint(2, (count,), generator=draw)
        radius = (uniform(6.5, 9.5, count) if last else uniform(2.0, 4.0, count)) * unit
        middle = uniform(0, 1, 2, count) * (size - 2 * radius) + radius
        turn = uniform(0, 2 * math.pi, count)
        tone = uniform(0.5, 1.0, count) * (torch.randint(2, (count,), generator=draw) * 2 - 1)
        inside = _coverage(x, y, kind, hollow, middle, turn, radius, unit) * drawn[:, None, None]
        image = image * (1 - inside) + inside * tone[:, None, None]
    image += noise * torch.randn(image.shape, generator=draw)
    return image[:, None] / _SCALE, labels


def _coverage(
    x: Tensor, y: Tensor, kind: Tensor, hollow: Tensor, middle: Tensor, turn: Tensor, radius: Tensor, unit: float
) -> Tensor:
    """Share of each pixel ``(count, size, size)`` that a shape covers, from its signed distance."""
    across, down = x - middle[0, :, None, None], y - middle[1, :, None, None]
    cos, sin = turn.cos()[:, None, None], turn.sin()[:, None, None]
    u, v = cos * across + sin * down, cos * down - sin * across
    r = radius[:, None, None]
    wide, high = u.abs(), v.abs()
    arm = 0.3 * r
    distances = torch.stack(
        [
            torch.hypot(u, v) - r,
            torch.maximum(wide, high) - 0.8 * r,
            torch.maximum(v, math.sqrt(0.75) * wide - 0.5 * v) - 0.55 * r,
            torch.minimum(torch.maximum(wide - r, high - arm), torch.maximum(high - r, wide - arm)),
        ]
    )
    distance = distances.gather(0, kind[None, :, None, None].expand(1, *u.shape))[0]
    line = (distance + _EDGE * unit / 2).abs() - _EDGE * unit / 2
    return (0.5 - torch.where(hollow[:, None, None] == 1, line, distance)).clamp(0, 1)
