"""Calibration and held-out data of the demo models. Held-out data never serves calibration."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from layerwright.core.calibration import Calibration
from layerwright.data.stdlib import stdlib_text

__all__ = ["demo_data", "digits"]

Part = Literal["train", "calibration", "heldout"]
_DIGITS = Path(__file__).parent / "demo" / "digits.npz"


@cache
def digits(part: Part) -> tuple[Tensor, Tensor]:
    """Handwritten digits (UCI, Alpaydin and Kaynak, 1998): ``(images (samples, 1, 8, 8) in -1..1, labels (samples,))``.

    Of the 1797 samples, one in five is held out and one in ten is for calibration, by a fixed permutation that is
    stored beside them.
    """
    import numpy

    with numpy.load(_DIGITS, allow_pickle=False) as arrays:
        chosen = arrays[part]
        images = torch.from_numpy(arrays["images"][chosen]).float().reshape(-1, 1, 8, 8) / 8 - 1
        return images, torch.from_numpy(arrays["labels"][chosen]).long()


def demo_data(
    name: str,
    processor: Any,
    part: Part = "calibration",
    samples: int = 128,
    length: int = 256,
    batch_size: int = 8,
) -> Calibration:
    """The `part` of the data that belongs to ``demo:lm``, ``demo:vit`` or ``demo:cnn``.

    Text comes as windows of `length` bytes of the standard library's sources; images as digits, enlarged to 32 x 32
    for ``demo:cnn``.
    """
    if name == "demo:lm":
        texts = stdlib_text(part, limit_bytes=max(200_000, 2 * samples * length))
        return Calibration.from_text(texts, processor, samples, length, batch_size, name=f"stdlib {part}")
    images, labels = digits(part)
    images, labels = images[:samples], labels[:samples]
    if name == "demo:cnn":
        images = enlarge(images)
    size = max(batch_size, 32)
    batches = [{"pixel_values": x, "labels": y} for x, y in zip(images.split(size), labels.split(size), strict=True)]
    return Calibration(batches, name=f"digits {part}", unit="nats/sample")


def enlarge(images: Tensor) -> Tensor:
    """Digits ``(samples, 1, 8, 8)`` as ``(samples, 1, 32, 32)``, bilinear."""
    return torch.nn.functional.interpolate(images, size=(32, 32), mode="bilinear", align_corners=False)
