"""Tasks on images: masked patches and classes, of grey scenes by code or the user's own images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layerwright.allocate.equal_parameters import Shape
from layerwright.core.errors import InputError
from layerwright.data.shape_grey import CLASSES, grey_scenes
from layerwright.models.masked_autoencoder import ImageClassifier, MaskedAutoencoder
from layerwright.recipes._classifier import read_images
from layerwright.recipes._shape_task import SEED_APART, ShapeTask, class_loss, digest, judge_classes, to_device
from layerwright.score.linear_probe import linear_probe

__all__ = ["image_task"]

PATCH, SIDE, DECODER = 4, 32, (64, 1)
HELDOUT, PROBED = 600, 1200
"""Images that quality is measured on, and that a linear probe is fitted to."""


def image_task(name: str, data: Path | None) -> ShapeTask:
    """``mae`` or ``supervised``; see `layerwright.recipes._shape_tasks.open_task`."""
    if data is None:
        test, classes, size, channels = grey_scenes(HELDOUT, seed=SEED_APART), CLASSES, SIDE, 1
        draw = grey_scenes
    else:
        test, classes, size, channels, draw = _own_images(data, HELDOUT)
    masked = name == "mae"
    seen = draw(PROBED, seed=2 * SEED_APART) if masked else test

    def build(shape: Shape, seed: int) -> nn.Module:
        model = MaskedAutoencoder(size, PATCH, channels, shape.dim, shape.layers, shape.heads, *DECODER, seed=seed)
        return model if masked else ImageClassifier(model.encoder, classes, seed=seed)

    def items(steps: int, batch: int, seed: int) -> list[Any]:
        images, labels = draw(steps * batch, seed=seed)
        other = labels
        if masked:
            generator = torch.Generator().manual_seed(seed + SEED_APART)
            other = torch.rand(len(images), (size // PATCH) ** 2, generator=generator)
        return list(zip(images.split(batch), other.split(batch), strict=True))

    def loss(model: nn.Module, item: Any) -> Tensor:
        return model(item[0], noise=item[1])[0] if masked else class_loss(model, item)  # type: ignore[no-any-return]

    @torch.no_grad()
    def judge(model: nn.Module) -> dict[str, float]:
        if not masked:
            return judge_classes(model, test)
        assert isinstance(model, MaskedAutoencoder)
        device = next(model.parameters()).device
        noise = torch.rand(len(test[0]), model.encoder.tokens, generator=torch.Generator().manual_seed(SEED_APART))
        rows = zip(test[0].split(100), noise.split(100), strict=True)
        total = sum(float(loss(model, to_device(row, device))) * len(row[0]) for row in rows) / len(test[0])
        features = [
            torch.cat([model.encode(part.to(device))[:, 1:].float().mean(1).cpu() for part in images.split(100)])
            for images in (seen[0], test[0])
        ]
        return {"quality": linear_probe(features[0], seen[1], features[1], test[1]), "loss": total}

    return ShapeTask(
        name,
        "accuracy of a linear probe" if masked else "accuracy",
        True,
        (size // PATCH) ** 2,
        False,
        False,
        build,
        items,
        loss,
        judge,
        lambda batch: draw(batch, seed=3 * SEED_APART)[0],
        lambda model: model.encoder,  # type: ignore[arg-type, return-value]
        True,
        digest(test[0]),
    )


def _own_images(data: Path, count: int) -> tuple[tuple[Tensor, Tensor], int, int, int, Callable[..., Any]]:
    """Held-out images, classes, size, channels, and a function that draws training images with repetition."""
    images = read_images(data, 0)
    if images.size % PATCH or images.size < 2 * PATCH:
        raise InputError(f"data: images of {data} are {images.size} pixels wide, expected a multiple of {PATCH}")

    def draw(samples: int, *, seed: int) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(images.train[1]), (samples,), generator=torch.Generator().manual_seed(seed))
        return images.train[0][chosen], images.train[1][chosen]

    test = (images.test[0][:count], images.test[1][:count])
    return test, images.classes, images.size, images.channels, draw
