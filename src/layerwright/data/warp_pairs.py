"""Pairs of pictures that show the same under a known map, with points and where they go."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from layerwright.core.errors import InputError, require_extra, unknown_name
from layerwright.data.shape_scenes import shape_scenes

__all__ = ["Family", "Warp", "WarpPairs", "warp_pairs", "warp_sources"]

Family = Literal["affine", "homography", "tps"]
FAMILIES: tuple[Family, ...] = ("affine", "homography", "tps")
_PHOTOGRAPHS = {"train": "china.jpg", "test": "flower.jpg"}
_ROOM = 2.0
"""Shorter side of the resized photograph over the side of a crop."""
_CONTROL = torch.cartesian_prod(*[torch.linspace(-1, 1, 3)] * 2)
"""Control points of the spline, in units of half a side."""
_STEPS = 12


@dataclass(frozen=True)
class Warp:
    """A map of the plane for each pair: a spline, then a projective matrix, about the middle of a picture.

    Attributes:
        matrix: ``(pairs, 3, 3)`` in units of half a side.
        bend: ``(pairs, 12, 2)`` weights of the thin-plate spline's displacement: 9 control points and an affine part.
        size: side of the pictures in pixels.
    """

    matrix: Tensor
    bend: Tensor
    size: int

    def __call__(self, points: Tensor) -> Tensor:
        """Where source points ``(pairs, points, 2)``, x and y in pixels, lie in the target."""
        unit = points * (2 / self.size) - 1
        return (_project(unit + self._displacement(unit), self.matrix) + 1) * (self.size / 2)

    def inverse(self, points: Tensor) -> Tensor:
        """Where target points ``(pairs, points, 2)`` come from; the spline by iteration, to a thousandth of a pixel."""
        wanted = _project(points * (2 / self.size) - 1, torch.linalg.inv(self.matrix))
        unit = wanted
        if bool(self.bend.any()):
            for _ in range(_STEPS):
                unit = wanted - self._displacement(unit)
        return (unit + 1) * (self.size / 2)

    def select(self, chosen: Tensor) -> Warp:
        """The maps of some pairs."""
        return Warp(self.matrix[chosen], self.bend[chosen], self.size)

    def _displacement(self, unit: Tensor) -> Tensor:
        if not bool(self.bend.any()):
            return torch.zeros_like(unit)
        return _spline_terms(unit) @ self.bend


@dataclass(frozen=True)
class WarpPairs:
    """Pairs of pictures and their points.

    Attributes:
        source: ``(pairs, 3, size, size)`` in 0..1.
        target: the same under `warp`, with other colours and noise.
        source_points: ``(pairs, points, 2)``: x and y in pixels, where the middle of the first pixel is at 0.5.
        target_points: ``warp(source_points)``.
        valid: ``(pairs, points)``: whether the target point is inside the picture.
        scale: ``(pairs,)`` how much longer things are in the target, at the middle.
        warp: the map from source to target.
    """

    source: Tensor
    target: Tensor
    source_points: Tensor
    target_points: Tensor
    valid: Tensor
    scale: Tensor
    warp: Warp

    def __len__(self) -> int:
        return len(self.source)

    def select(self, chosen: Tensor) -> WarpPairs:
        """The pairs at the places `chosen`, or where a mask is true."""
        tensors = {name: value[chosen] for name, value in vars(self).items() if isinstance(value, Tensor)}
        return WarpPairs(**tensors, warp=self.warp.select(chosen))


@cache
def warp_sources(part: Literal["train", "test"], drawn: int = 4) -> tuple[Tensor, ...]:
    """Pictures ``(3, height, width)`` in 0..1 to cut from; those to train on and to test on are different ones.

    One photograph that comes with scikit-learn (a palace to train on, a flower to test on), nothing is downloaded, and
    `drawn` crowded scenes of shapes and strokes; the photograph is listed as often as there are scenes, so that half of
    all crops are of it.

    Raises:
        InputError: an unknown part.
        FileNotFoundError: scikit-learn without its photographs.
        MissingExtraError: scikit-learn or Pillow is not installed.
    """
    if part not in _PHOTOGRAPHS:
        raise unknown_name("part", str(part), _PHOTOGRAPHS)
    # Where it lies is enough: importing it takes seconds.
    spec = find_spec("sklearn")
    origin = (spec and spec.origin) or require_extra("sklearn", "data").__file__
    photograph = _photograph(Path(str(origin)).parent / "datasets" / "images" / _PHOTOGRAPHS[part])
    seed = 101 if part == "train" else 202
    scenes = shape_scenes(drawn, 128, objects=(8, 12), strokes=(10, 20), radius=(0.06, 0.15), noise=0.02, seed=seed)
    return (*[photograph] * max(1, drawn), *scenes.images)


def warp_pairs(
    count: int,
    size: int = 128,
    family: Family = "affine",
    *,
    pictures: Sequence[Tensor] | None = None,
    part: Literal["train", "test"] = "train",
    points: int = 24,
    scale: tuple[float, float] = (0.7, 1.4),
    rotation: float = 20.0,
    shift: float = 0.1,
    jitter: float = 0.3,
    noise: float = 0.03,
    seed: int = 0,
) -> WarpPairs:
    """`count` crops of pictures, each with the same scene under a random map.

    Maps turn, scale, shear by up to 0.1 and shift; ``homography`` adds perspective and ``tps`` a thin-plate spline that
    moves nine points by up to a tenth of half a side. Points are where the source has detail. The target's colours
    change channel by channel: gain, offset and gamma. Same arguments, same pairs.

    Args:
        count: number of pairs, at least 1.
        size: height and width in pixels, at least 16.
        family: ``affine``, ``homography`` or ``tps``.
        pictures: ``(3, height, width)`` in 0..1 to cut from; `warp_sources` of `part` if left out.
        part: ``train`` or ``test``.
        points: of each pair, at least 1.
        scale: smallest and largest enlargement, even in the logarithm.
        rotation: largest turn in degrees.
        shift: largest shift along each axis, as a share of the side.
        jitter: strength of the change of colours; 0 leaves them.
        noise: standard deviation of what is added to the target.
        seed: of everything random.

    Raises:
        InputError: an argument outside its range, or a picture of another form.
    """
    _check(count, size, family, points, scale, rotation, shift, jitter, noise)
    sources = [_fitted(picture, size) for picture in (warp_sources(part) if pictures is None else pictures)]
    if not sources:
        raise InputError("pictures: got none, expected at least one")
    draw = torch.Generator().manual_seed(seed)
    warp, scales = _warps(count, size, family, scale, rotation, shift, draw)
    which = torch.randint(len(sources), (count,), generator=draw)
    corner = torch.rand(count, 2, generator=draw)
    grid = torch.arange(size) + 0.5
    pixels = torch.cartesian_prod(grid, grid).flip(1).expand(count, -1, -1)
    source = _cut(sources, which, corner, pixels, size)
    target = _cut(sources, which, corner, warp.inverse(pixels), size)
    target = _recoloured(target, jitter, draw) + noise * torch.randn(target.shape, generator=draw)
    start = _points(source, warp, points, draw)
    goal = warp(start)
    valid = ((goal >= 0) & (goal <= size)).all(-1)
    return WarpPairs(source, target.clamp(0, 1), start, goal, valid, scales, warp)


def _check(
    count: int,
    size: int,
    family: str,
    points: int,
    scale: tuple[float, float],
    rotation: float,
    shift: float,
    jitter: float,
    noise: float,
) -> None:
    if family not in FAMILIES:
        raise unknown_name("family", str(family), FAMILIES)
    for name, number, least in (("count", count, 1), ("size", size, 16), ("points", points, 1)):
        if number < least:
            raise InputError(f"{name}: got {number}, expected at least {least}")
    if not 0 < scale[0] <= scale[1]:
        raise InputError(f"scale: got {scale}, expected positive numbers, the smaller first")
    if not 0 <= shift < 0.5:
        raise InputError(f"shift: got {shift}, expected a share of the side in [0, 0.5)")
    for name, amount in (("rotation", rotation), ("jitter", jitter), ("noise", noise)):
        if amount < 0:
            raise InputError(f"{name}: got {amount}, expected 0 or more")


@cache
def _photograph(path: Path) -> Tensor:
    if not path.is_file():
        raise FileNotFoundError(f"no photograph at {path}: reinstall scikit-learn, or give pictures of your own")
    import numpy

    with require_extra("PIL.Image", "images").open(path) as image:
        pixels = numpy.asarray(image.convert("RGB"))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


def _fitted(picture: Tensor, size: int) -> Tensor:
    """A picture whose shorter side is `_ROOM` times `size`, smoothed before it shrinks."""
    if picture.dim() != 3 or picture.shape[0] != 3 or not picture.is_floating_point():
        raise InputError(f"pictures: got {picture.dtype} {tuple(picture.shape)}, expected floats (3, height, width)")
    factor = _ROOM * size / min(picture.shape[1:])
    sides = [round(side * factor) for side in picture.shape[1:]]
    return functional.interpolate(picture[None], sides, mode="bilinear", antialias=True, align_corners=False)[0]


def _warps(
    count: int,
    size: int,
    family: Family,
    scale: tuple[float, float],
    rotation: float,
    shift: float,
    draw: torch.Generator,
) -> tuple[Warp, Tensor]:
    def between(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=draw)

    scales = between(math.log(scale[0]), math.log(scale[1])).exp()
    turn = between(-rotation, rotation).deg2rad()
    shear = between(-0.1, 0.1)
    cosine, sine = turn.cos(), turn.sin()
    turned = torch.stack([cosine, -sine, sine, cosine], 1).view(count, 2, 2)
    sheared = torch.eye(2).repeat(count, 1, 1)
    sheared[:, 0, 1] = shear
    matrix = torch.eye(3).repeat(count, 1, 1)
    matrix[:, :2, :2] = scales[:, None, None] * turned @ sheared
    matrix[:, :2, 2] = between(-2 * shift, 2 * shift, 2)
    if family == "homography":
        matrix[:, 2, :2] = between(-0.15, 0.15, 2)
    bend = torch.zeros(count, len(_CONTROL) + 3, 2)
    if family == "tps":
        bend = _spline(between(-0.1, 0.1, len(_CONTROL), 2))
    return Warp(matrix, bend, size), scales


def _project(points: Tensor, matrix: Tensor) -> Tensor:
    moved = torch.cat([points, torch.ones_like(points[..., :1])], -1) @ matrix.transpose(1, 2)
    return moved[..., :2] / moved[..., 2:]


def _spline_terms(points: Tensor) -> Tensor:
    """``r^2 log r`` to each control point, 1, x and y: ``(..., 12)``."""
    squares = (points[..., None, :] - _CONTROL.to(points.dtype)).square().sum(-1)
    bells = 0.5 * squares * squares.clamp_min(1e-12).log()
    return torch.cat([bells, torch.ones_like(points[..., :1]), points], -1)


def _spline(moves: Tensor) -> Tensor:
    """Weights ``(pairs, 12, 2)`` of the thin-plate spline that moves the control points by `moves` ``(pairs, 9, 2)``."""
    count = len(_CONTROL)
    terms = _spline_terms(_CONTROL)
    system = torch.zeros(count + 3, count + 3)
    system[:count], system[count:, :count] = terms, terms[:, count:].T
    wanted = torch.cat([moves, moves.new_zeros(len(moves), 3, 2)], 1)
    return torch.linalg.solve(system.double(), wanted.double()).float()


def _cut(sources: Sequence[Tensor], which: Tensor, corner: Tensor, places: Tensor, size: int) -> Tensor:
    """Pictures ``(pairs, 3, size, size)`` read at `places` ``(pairs, size size, 2)`` of crops; mirrored past the rims."""
    out = torch.empty(len(which), 3, size, size)
    for number, picture in enumerate(sources):
        chosen = which == number
        if not chosen.any():
            continue
        sides = torch.tensor([picture.shape[2], picture.shape[1]], dtype=torch.float32)
        first = (0.2 + 0.6 * corner[chosen])[:, None] * (sides - size)
        grid = ((places[chosen] + first) * 2 / sides - 1).view(-1, size, size, 2)
        read = picture.expand(len(grid), -1, -1, -1)
        out[chosen] = functional.grid_sample(read, grid, padding_mode="reflection", align_corners=False)
    return out


def _recoloured(images: Tensor, strength: float, draw: torch.Generator) -> Tensor:
    """Another gain, offset and gamma for each channel of each picture."""
    change = strength * (2 * torch.rand(3, *images.shape[:2], 1, 1, generator=draw) - 1)
    return images.clamp(0, 1).pow(change[0].exp()) * (1 + change[1]) + 0.3 * change[2]


def _points(source: Tensor, warp: Warp, count: int, draw: torch.Generator) -> Tensor:
    """The points of the source with the most detail out of four times as many; those inside the target first."""
    size = source.shape[-1]
    grey = source.mean(1, keepdim=True)
    middle = functional.avg_pool2d(functional.pad(grey, (2, 2, 2, 2), mode="replicate"), 5, 1)
    detail = functional.avg_pool2d((grey - middle).abs(), 5, 1, 2)
    tried = (0.04 + 0.92 * torch.rand(len(source), 4 * count, 2, generator=draw)) * size
    found = functional.grid_sample(detail, tried[:, None] * (2 / size) - 1, align_corners=False)[:, 0, 0]
    goal = warp(tried)
    inside = ((goal >= 0) & (goal <= size)).all(-1)
    best = (found + inside).topk(count, 1).indices
    return tried.gather(1, best[..., None].expand(-1, -1, 2))
