"""Pictures of simple shapes, drawn by formula, with exact masks, boxes and depths."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from layerwright.core.errors import InputError

__all__ = ["SHAPES", "Scenes", "needle_scenes", "shape_scenes", "single_scenes"]

SHAPES = ("disc", "square", "triangle", "cross", "ring", "star")
_VISIBLE = 12
"""Fewest pixels of an object that may be seen."""
_CHUNK = 64
_ATTEMPTS = 100


@dataclass(frozen=True)
class Scenes:
    """Pictures and what is in them.

    Attributes:
        images: ``(scenes, 3, size, size)`` in 0..1.
        semantic: ``(scenes, size, size)``, 0 for the background, 1 + class elsewhere.
        instance: ``(scenes, size, size)``, 0 for the background, 1 + number of the object elsewhere.
        depth: ``(scenes, size, size)``; objects at 1..10, the background behind them all.
        labels: ``(scenes, objects)`` classes, -1 where a scene has fewer objects.
        object_depths: ``(scenes, objects)``.
        boxes: ``(scenes, objects, 4)``: left, top, right, bottom of the visible pixels, right and bottom exclusive;
            -1 where a scene has fewer objects.
        strokes: ``(scenes,)`` strokes of clutter.
    """

    images: Tensor
    semantic: Tensor
    instance: Tensor
    depth: Tensor
    labels: Tensor
    object_depths: Tensor
    boxes: Tensor
    strokes: Tensor

    def __len__(self) -> int:
        return len(self.images)

    @property
    def first_labels(self) -> Tensor:
        """Class of the first object of each scene ``(scenes,)``: the label of a scene with one object."""
        return self.labels[:, 0]

    def select(self, chosen: Tensor) -> Scenes:
        """The scenes at the places `chosen`, or where a mask is true."""
        return Scenes(**{name: value[chosen] for name, value in vars(self).items()})


def shape_scenes(
    count: int,
    size: int = 64,
    classes: Sequence[str] = SHAPES,
    objects: tuple[int, int] = (1, 4),
    strokes: tuple[int, int] = (0, 0),
    radius: tuple[float, float] = (0.1, 0.22),
    noise: float = 0.05,
    *,
    seed: int = 0,
) -> Scenes:
    """`count` scenes of several shapes that hide one another, over a background with strokes.

    Masks are decided at the centres of pixels; colours are means of four points of a pixel. The nearest object wins.
    A scene in which fewer than 12 pixels of an object are visible is drawn anew. The same arguments give the same
    scenes.

    Args:
        count: number of scenes.
        size: height and width in pixels, at least 16.
        classes: names out of `SHAPES`.
        objects: fewest and most objects of a scene.
        strokes: fewest and most strokes of clutter, behind the objects.
        radius: smallest and largest radius, as shares of `size`.
        noise: standard deviation of what is added to the colours.
        seed: of everything random.

    Raises:
        InputError: an argument outside its range, or objects too small to be seen.
    """
    _check(count, size, classes, objects, strokes, radius, noise)
    draw = torch.Generator().manual_seed(seed)
    pieces: list[Scenes] = []
    while (have := sum(map(len, pieces))) < count:
        for attempt in range(_ATTEMPTS):
            drawn = _draw(min(_CHUNK, count - have), size, classes, objects, strokes, radius, noise, draw)
            seen = _all_visible(drawn)
            if seen.any():
                pieces.append(drawn.select(seen))
                break
            if attempt == _ATTEMPTS - 1:
                raise InputError(
                    f"radius: {radius} of {size} pixels leaves fewer than {_VISIBLE} pixels of an object visible"
                )
    names = vars(pieces[0]) if pieces else {}
    if not pieces:
        return _draw(0, size, classes, objects, strokes, radius, noise, draw)
    return Scenes(**{name: torch.cat([vars(piece)[name] for piece in pieces]) for name in names})


def single_scenes(count: int, size: int = 64, *, noise: float = 0.05, seed: int = 0, **settings: Any) -> Scenes:
    """Scenes with one object anywhere; its class is the label. `settings` as for `shape_scenes`."""
    settings = {"radius": (0.14, 0.3), **settings}
    return shape_scenes(count, size, objects=(1, 1), noise=noise, seed=seed, **settings)


def needle_scenes(
    count: int,
    size: int = 64,
    strokes: tuple[int, int] = (0, 20),
    *,
    noise: float = 0.05,
    seed: int = 0,
    **settings: Any,
) -> Scenes:
    """Scenes with one small object among strokes; its class is the label. `settings` as for `shape_scenes`."""
    smallest = max(0.07, 3.2 / size)
    settings = {"radius": (smallest, smallest + 0.025), **settings}
    return shape_scenes(count, size, objects=(1, 1), strokes=strokes, noise=noise, seed=seed, **settings)


def _check(
    count: int,
    size: int,
    classes: Sequence[str],
    objects: tuple[int, int],
    strokes: tuple[int, int],
    radius: tuple[float, float],
    noise: float,
) -> None:
    if count < 0:
        raise InputError(f"count: got {count}, expected 0 or more scenes")
    if size < 16:
        raise InputError(f"size: got {size}, expected at least 16 pixels")
    if unknown := [name for name in classes if name not in SHAPES]:
        raise InputError(f"classes: {', '.join(unknown)} unknown; expected some of {', '.join(SHAPES)}")
    if not classes:
        raise InputError("classes: got none, expected at least one")
    for name, (low, high), least in (("objects", objects, 1), ("strokes", strokes, 0)):
        if not least <= low <= high:
            raise InputError(f"{name}: got ({low}, {high}), expected {least} <= fewest <= most")
    if not 0 < radius[0] <= radius[1] < 0.5:
        raise InputError(f"radius: got {radius}, expected shares of the size below 0.5, the smaller first")
    if noise < 0:
        raise InputError(f"noise: got {noise}, expected 0 or more")


def _draw(
    count: int,
    size: int,
    classes: Sequence[str],
    objects: tuple[int, int],
    strokes: tuple[int, int],
    radius: tuple[float, float],
    noise: float,
    draw: torch.Generator,
) -> Scenes:
    def between(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=draw)

    most = objects[1]
    number = torch.randint(objects[0], most + 1, (count,), generator=draw)
    kinds = torch.randint(len(classes), (count, most), generator=draw)
    radii = between(radius[0] * size, radius[1] * size, most)
    centres = radii[..., None] + between(0, 1, most, 2) * (size - 2 * radii[..., None])
    turns = between(0, 2 * math.pi, most)
    depths = between(1, 10, most).sort(1, descending=True).values
    colours = _bright(between(0, 1, most), between(0.75, 1.0, most))
    stroke_count = torch.randint(strokes[0], strokes[1] + 1, (count,), generator=draw)

    centre = torch.arange(size) + 0.5
    canvas = _background(count, size, between, centre)
    _add_strokes_(canvas, stroke_count, strokes[1], between, centre, size)
    fine = torch.stack(torch.meshgrid(*[(torch.arange(2 * size) + 0.5) / 2] * 2, indexing="xy"), -1)
    points = torch.stack(torch.meshgrid(centre, centre, indexing="xy"), -1)
    instance = torch.zeros(count, size, size, dtype=torch.long)
    plane = between(10.5, 12, 1, 1) + between(0, 0.05, 1, 1) * centre[None, :, None]
    depth = plane.expand(count, size, size).clone()
    numbers = [SHAPES.index(name) for name in classes]
    shapes = torch.tensor(numbers)[kinds] if count else kinds
    for place in range(most):
        there = number > place
        form = (shapes[:, place], centres[:, place], radii[:, place], turns[:, place])
        covered = _inside(fine, *form).reshape(count, size, 2, size, 2).float().mean((2, 4))
        covered = (covered * there[:, None, None])[:, None]
        canvas = canvas * (1 - covered) + covered * colours[:, place, :, None, None]
        mask = _inside(points, *form) & there[:, None, None]
        instance[mask] = place + 1
        depth = torch.where(mask, depths[:, place, None, None], depth)
    images = (canvas + noise * torch.randn(canvas.shape, generator=draw)).clamp(0, 1)
    present = torch.arange(most) < number[:, None]
    labels = torch.where(present, kinds, -1)
    semantic = torch.cat([torch.zeros(count, 1, dtype=torch.long), labels + 1], 1).gather(1, instance.flatten(1))
    return Scenes(
        images, semantic.reshape(instance.shape), instance, depth, labels, depths.where(present, torch.tensor(-1.0)),
        _boxes(instance, most), stroke_count,
    )  # fmt: skip


def _bright(hue: Tensor, value: Tensor) -> Tensor:
    """Strong colours ``(..., 3)``: of a `hue` in 0..1, the largest channel `value`, the smallest a quarter of it."""
    phases = (hue[..., None] + torch.tensor([0.0, 2 / 3, 1 / 3])) % 1.0
    wave = (2 - (phases * 6 - 3).abs()).neg().add(1).clamp(0, 1)
    return value[..., None] * (0.25 + 0.75 * wave)


def _background(count: int, size: int, between: Callable[..., Tensor], centre: Tensor) -> Tensor:
    """Dim grey with a slope, ``(count, 3, size, size)``."""
    base = between(0.1, 0.3, 3, 1, 1)
    slope = between(-0.15, 0.15, 1, 1, 1) * (centre / size)[:, None] + between(-0.15, 0.15, 1, 1, 1) * (centre / size)
    return (base + slope).clamp(0, 1)


def _add_strokes_(
    canvas: Tensor, number: Tensor, most: int, between: Callable[..., Tensor], centre: Tensor, size: int
) -> None:
    """Draw `number` straight strokes a scene onto `canvas`, with smooth rims."""
    rows, columns = centre[:, None], centre
    for place in range(most):
        middle, angle, half = between(0, size, 2), between(0, math.pi), between(0.04, 0.12) * size
        colour = _bright(between(0, 1), between(0.5, 0.9))
        x, y = columns - middle[:, 0, None, None], rows - middle[:, 1, None, None]
        cosine, sine = angle.cos()[:, None, None], angle.sin()[:, None, None]
        along = (x * cosine + y * sine).abs() - half[:, None, None]
        across = (y * cosine - x * sine).abs()
        cover = (1.2 - torch.hypot(along.clamp_min(0), across)).clamp(0, 1) * (number > place)[:, None, None]
        canvas.mul_(1 - cover[:, None]).add_(cover[:, None] * colour[:, :, None, None])


def _inside(points: Tensor, kind: Tensor, centre: Tensor, radius: Tensor, turn: Tensor) -> Tensor:
    """Whether each of `points` ``(height, width, 2)`` is in the shape of each scene: ``(scenes, height, width)``."""
    local = points[None] - centre[:, None, None]
    cosine, sine = turn.cos()[:, None, None], turn.sin()[:, None, None]
    scale = radius[:, None, None]
    x = (local[..., 0] * cosine + local[..., 1] * sine) / scale
    y = (local[..., 1] * cosine - local[..., 0] * sine) / scale
    found = torch.zeros(x.shape, dtype=torch.bool)
    for number, name in enumerate(SHAPES):
        chosen = kind == number
        if chosen.any():
            found[chosen] = _FORMS[name](x[chosen], y[chosen])
    return found


def _star(x: Tensor, y: Tensor) -> Tensor:
    """Five points on the unit circle; the notches at 0.45 of it."""
    sector = math.pi / 5
    angle = (torch.atan2(y, x) % (2 * sector) - sector).abs()
    distance = torch.hypot(x, y)
    # The edge from the notch at angle 0 to the point at angle pi / 5.
    across, along = distance * angle.cos(), distance * angle.sin()
    point = (math.cos(sector), math.sin(sector))
    return (across - 0.45) * point[1] - along * (point[0] - 0.45) <= 0


_FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "disc": lambda x, y: x * x + y * y <= 1,
    "square": lambda x, y: torch.maximum(x.abs(), y.abs()) <= 0.75,
    "triangle": lambda x, y: torch.maximum(-y, (math.sqrt(3) * x.abs() + y) / 2) <= 0.5,
    "cross": lambda x, y: (torch.minimum(x.abs(), y.abs()) <= 0.3) & (torch.maximum(x.abs(), y.abs()) <= 0.95),
    "ring": lambda x, y: (torch.hypot(x, y) - 0.75).abs() <= 0.25,
    "star": _star,
}


def _boxes(instance: Tensor, most: int) -> Tensor:
    """Bounds of the visible pixels of each object, ``(scenes, most, 4)``; -1 where none is visible."""
    masks = instance[:, None] == torch.arange(1, most + 1)[:, None, None]
    columns, rows = masks.any(2), masks.any(3)
    size = instance.shape[-1]

    def ends(line: Tensor) -> tuple[Tensor, Tensor]:
        line = line.long()
        return line.argmax(-1), size - line.flip(-1).argmax(-1)

    (left, right), (top, bottom) = ends(columns), ends(rows)
    boxes = torch.stack([left, top, right, bottom], -1)
    return torch.where(masks.flatten(2).any(-1)[..., None], boxes, -1)


def _all_visible(scenes: Scenes) -> Tensor:
    """Scenes ``(scenes,)`` in which at least 12 pixels of every object are visible."""
    most = scenes.labels.shape[1]
    pixels = (scenes.instance[:, None] == torch.arange(1, most + 1)[:, None, None]).sum((2, 3))
    return ((pixels >= _VISIBLE) | (scenes.labels < 0)).all(1)
