"""Digits in parts, few of each class, and pictures moved a little."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from layerwright.core.errors import InputError
from layerwright.data.demo_data import digits
from layerwright.data.folds import stratified_folds

__all__ = ["few_shot", "shifted", "split_digits"]
Labelled = tuple[Tensor, Tensor]


@cache
def split_digits(size: int = 8, channels: int = 1, seed: int = 0) -> tuple[Labelled, Labelled, Labelled]:
    """All 1797 handwritten digits in three stratified parts of 60, 20 and 20 %: training, validation and test.

    Pictures ``(samples, channels, size, size)``, bilinear, less the mean and over the standard deviation of the
    training part; labels ``(samples,)``.
    """
    if size % 8:
        raise InputError(f"size: got {size}, expected a multiple of 8")
    parts = [digits(part) for part in ("train", "calibration", "heldout")]
    images, labels = (torch.cat(group) for group in zip(*parts, strict=True))
    parts_of_five = [judged for _, judged in stratified_folds(labels, 5, seed=seed)]
    places = [torch.cat(parts_of_five[:3]), *parts_of_five[3:]]
    mean, deviation = images[places[0]].mean(), images[places[0]].std()
    images = (images - mean) / deviation
    if size > 8:
        images = functional.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    images = images.expand(-1, channels, -1, -1).contiguous()
    first, second, third = ((images[place], labels[place]) for place in places)
    return first, second, third


def few_shot(data: Labelled, per_class: int, seed: int = 0) -> Labelled:
    """`per_class` samples of each class, drawn at random.

    Raises:
        InputError: a class has fewer.
    """
    images, labels = data
    draw = torch.Generator().manual_seed(seed)
    chosen = []
    for label in labels.unique().tolist():
        places = (labels == label).nonzero()[:, 0]
        if len(places) < per_class:
            raise InputError(f"per_class: got {per_class}, but class {label} has {len(places)} samples")
        chosen.append(places[torch.randperm(len(places), generator=draw)[:per_class]])
    place = torch.cat(chosen)
    return images[place], labels[place]


def shifted(images: Tensor, generator: torch.Generator, pixels: int = 1) -> Tensor:
    """Each picture moved by up to `pixels` along both axes; the rim is repeated."""
    height, width = images.shape[-2:]
    wide = functional.pad(images, (pixels,) * 4, mode="replicate")
    moves = torch.randint(2 * pixels + 1, (2, len(images)), generator=generator)
    rows = (moves[0][:, None] + torch.arange(height))[:, None, :, None]
    columns = (moves[1][:, None] + torch.arange(width))[:, None, None, :]
    sample = torch.arange(len(images))[:, None, None, None]
    channel = torch.arange(images.shape[1])[None, :, None, None]
    return wide[sample, channel, rows, columns]
