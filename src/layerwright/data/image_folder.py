"""Read a folder of labelled images as a model without a processor takes them: its channels, its size, around 0."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerwright.core.calibration import Calibration
from layerwright.core.corpus import read_image_folder
from layerwright.core.errors import InputError

__all__ = ["ImageFolder", "image_folder"]


@dataclass(frozen=True)
class ImageFolder:
    """Labelled images.

    Attributes:
        images: ``(samples, channels, height, width)``.
        labels: ``(samples,)``, numbers of classes.
        classes: names of the subfolders, sorted; a label is a place in it.
        name: of the folder.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    name: str

    def calibration(self, batch_size: int = 32) -> Calibration:
        """The images in batches of mappings ``pixel_values``, ``labels``."""
        parts = zip(self.images.split(batch_size), self.labels.split(batch_size), strict=True)
        return Calibration([{"pixel_values": x, "labels": y} for x, y in parts], name=self.name, unit="nats/sample")


def image_folder(folder: str | Path, config: Mapping[str, Any], processor: Any = None) -> ImageFolder:
    """Images of ``folder/class/image.png`` for a model, classes in turns.

    Args:
        folder: one subfolder for each class.
        config: of the model; its ``num_channels`` and ``image_size`` say what images become.
        processor: a Hugging Face image processor; None scales each image to the model's size and to -1..1.

    Raises:
        FileNotFoundError: no folder there.
        InputError: fewer than two classes, a class without images, a file that is no image.
    """
    folder = Path(folder)
    size = config.get("image_size")
    height, width = (size if isinstance(size, list | tuple) else (size, size)) if size else (None, None)
    fit = processor or _Fit(int(config.get("num_channels") or 3), height, width)
    try:
        images, labels = read_image_folder(folder, fit, None)
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise InputError(f"{folder} holds a file that is no image ({error})") from error
    classes = tuple(path.name for path in sorted(p for p in folder.iterdir() if p.is_dir()))
    missing = sorted(set(range(len(classes))) - set(labels.tolist()))
    if missing:
        raise InputError(f"{folder / classes[missing[0]]} holds no images: fill the class folder or remove it")
    if len(classes) < 2:
        raise InputError(f"{folder} has the one class {classes[0]}; give one folder for each of at least 2 classes")
    return ImageFolder(images, labels, classes, folder.name)


@dataclass(frozen=True)
class _Fit:
    """Stands in for an image processor: ``fit(images=image)["pixel_values"][0]``."""

    channels: int
    height: int | None
    width: int | None

    def __call__(self, images: Any, return_tensors: str = "pt") -> dict[str, list[Tensor]]:
        import numpy

        image = images.convert("L" if self.channels == 1 else "RGB")
        if self.height and self.width and image.size != (self.width, self.height):
            image = image.resize((self.width, self.height))
        pixels = torch.from_numpy(numpy.array(image, dtype="float32")) / 127.5 - 1
        return {"pixel_values": [pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1)]}
