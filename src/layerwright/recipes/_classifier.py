"""Images with labels in three parts, and short training of a classifier."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from layerwright.core.calibration import evaluating
from layerwright.core.corpus import read_arrays, read_image_folder
from layerwright.core.errors import InputError
from layerwright.data.demo_data import digits

__all__ = ["Images", "accuracy", "digits_images", "read_images", "train_network_"]

Part = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Images:
    """Images ``(samples, channels, size, size)`` and labels ``(samples,)``: to train on, to choose by, to report.

    Attributes:
        train, validation, test: of each part.
        name: shown in results.
        mean, std: of each channel, that were taken off and divided by; empty if the images are as they came.
    """

    train: Part
    validation: Part
    test: Part
    name: str = "images"
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    @property
    def classes(self) -> int:
        """Number of classes."""
        return int(max(labels.max() for _, labels in (self.train, self.validation, self.test))) + 1

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return int(self.train[0].shape[1])

    def fingerprint(self) -> str:
        """Hash of all images and labels."""
        digest = hashlib.sha256()
        for part in (self.train, self.validation, self.test):
            for tensor in part:
                digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    @property
    def size(self) -> int:
        """Height and width of an image."""
        return int(self.train[0].shape[2])


def digits_images(seed: int = 0) -> Images:
    """Handwritten digits of 8 x 8 that come with the package: 1200 to train on, 300 to choose by, 297 to report."""
    parts = [digits(part) for part in ("train", "calibration", "heldout")]
    images = torch.cat([images for images, _ in parts])
    labels = torch.cat([labels for _, labels in parts])
    return _split(images, labels, seed, 1200, 300, "digits")


def read_images(path: str | Path, seed: int = 0) -> Images:
    """Images of an ``.npz`` file (arrays ``x`` and ``y``) or a folder of class folders: 4 in 6, 1 in 6, 1 in 6.

    Each channel is brought to mean 0 and variance 1 of the training part.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        InputError: not square, too few samples, labels that are no counting numbers, or one class.
    """
    path = Path(path)
    images, labels = read_image_folder(path) if path.is_dir() else read_arrays(path)
    if images.dim() == 3:
        images = images[:, None]
    if images.dim() != 4 or images.shape[2] != images.shape[3]:
        raise InputError(f"{path}: got images {tuple(images.shape[1:])}, expected square ones (channels, size, size)")
    if not bool(images.isfinite().all()):
        raise InputError(f"{path} holds NaN or infinite values; clean the data")
    if len(labels) < 24 or int(labels.min()) < 0 or int(labels.max()) < 1:
        raise InputError(
            f"{path}: got {len(labels)} samples with labels {int(labels.min())} to {int(labels.max())}, expected at "
            "least 24 of at least 2 classes, counted from 0"
        )
    held = len(labels) // 6
    data = _split(images, labels, seed, len(labels) - 2 * held, held, path.name)
    mean = data.train[0].mean((0, 2, 3))
    std = data.train[0].std((0, 2, 3)).clamp(min=1e-6)

    def scaled(part: Part) -> Part:
        return (part[0] - mean[:, None, None]) / std[:, None, None], part[1]

    return Images(
        scaled(data.train),
        scaled(data.validation),
        scaled(data.test),
        path.name,
        tuple(mean.tolist()),
        tuple(std.tolist()),
    )


def _split(images: Tensor, labels: Tensor, seed: int, train: int, validation: int, name: str) -> Images:
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    first, second = order[:train], order[train : train + validation]
    last = order[train + validation :]
    parts = [(images[part], labels[part]) for part in (first, second, last)]
    return Images(parts[0], parts[1], parts[2], name)


def train_network_(
    model: nn.Module,
    part: Part,
    *,
    epochs: int,
    learning_rate: float = 0.02,
    batch_size: int = 64,
    weight_decay: float = 1e-4,
    seed: int = 0,
) -> None:
    """Train a classifier in place: SGD with Nesterov momentum 0.9, the rate on a cosine down to 0.

    Unlike the tuners, in training mode, so that BatchNorm learns its statistics. A last batch of one sample is left
    out. The model is put back into evaluation mode.

    Raises:
        InputError: a number outside its range, or a loss that is not finite.
    """
    if epochs < 0 or batch_size < 2 or not (math.isfinite(learning_rate) and learning_rate > 0) or weight_decay < 0:
        raise InputError("epochs must be at least 0, batch_size 2, learning_rate above 0, weight_decay at least 0")
    images, labels = part
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=learning_rate, momentum=0.9, nesterov=True, weight_decay=weight_decay
    )
    starts = [start for start in range(0, len(labels), batch_size) if len(labels) - start > 1]
    steps = epochs * len(starts)
    model.train()
    try:
        for epoch in range(epochs):
            order = torch.randperm(len(labels), generator=generator)
            for number, start in enumerate(starts):
                done = epoch * len(starts) + number
                optimizer.param_groups[0]["lr"] = learning_rate * 0.5 * (1 + math.cos(math.pi * done / steps))
                chosen = order[start : start + batch_size]
                with torch.enable_grad():
                    loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
                if not torch.isfinite(loss):
                    raise InputError(f"the loss is not finite in epoch {epoch}: lower the learning rate")
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
    finally:
        model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, part: Part, batch_size: int = 512) -> float:
    """Share of the samples whose class the model finds."""
    images, labels = part
    with evaluating(model):
        right = sum(
            int((model(x).argmax(1) == y).sum())
            for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True)
        )
    return right / len(labels)
