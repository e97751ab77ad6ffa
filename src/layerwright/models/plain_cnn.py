"""A plain convolutional network, described by a list of words."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from layerwright.core.errors import InputError

__all__ = ["PlainCNN"]

_CONV = re.compile(r"conv-([1-9]\d*)-([1-9]\d*)")
_FC = re.compile(r"fc-([1-9]\d*)")


class PlainCNN(nn.Module):
    """Convolutions, pools and fully connected layers in a row, then a classifier.

    ``conv-8-3`` is a convolution with 8 filters of 3 x 3, ``fc-16`` a fully connected layer of 16 units, each with
    BatchNorm and ReLU behind it; ``pool`` halves the image by maxima.

    Args:
        spec: the words, in order; fully connected layers come last.
        classes: outputs of the classifier.
        channels: of the images.
        size: height and width of the images.
        batch_norm: False leaves it out, and the layers have biases.
        generator: of the first weights (He, 2015); seed 0 if left out.

    Raises:
        InputError: a word of another form, an even kernel, a convolution or pool behind a fully connected layer, or
            more pools than the image bears.
    """

    def __init__(
        self,
        spec: Sequence[str],
        classes: int = 10,
        channels: int = 1,
        size: int = 8,
        batch_norm: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.classes, self.channels, self.size, self.batch_norm = classes, channels, size, batch_norm
        modules: list[nn.Module] = []
        width, edge = channels, size
        flat = False
        for kind, outputs, kernel in _words(spec):
            if kind != "fc" and flat:
                raise InputError(f"spec: {kind} behind a fully connected layer in {'_'.join(spec)}")
            if kind == "pool":
                edge //= 2
                if not edge:
                    raise InputError(f"spec: {'_'.join(spec)} has more pools than images of {size} x {size} bear")
                modules.append(nn.MaxPool2d(2))
                continue
            if kind == "fc" and not flat:
                modules.append(nn.Flatten())
                width, flat = width * edge * edge, True
            modules += _unit(kind, width, outputs, kernel, batch_norm)
            width = outputs
        if not flat:
            modules.append(nn.Flatten())
            width *= edge * edge
        head = nn.utils.skip_init(nn.Linear, width, classes, device="cpu")
        self.layers = nn.Sequential(*modules, head)
        _start_(self, generator)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Logits ``(batch, classes)`` of images ``(batch, channels, size, size)``."""
        output: Tensor = self.layers(pixel_values)
        return output

    def to_spec(self) -> list[str]:
        """The words, read from the layers as they are now."""
        return [word for word, _ in self.places()]

    def places(self) -> list[tuple[str, str]]:
        """Each word and the path of its layer, without the classifier."""
        found: list[tuple[str, str]] = []
        for name, module in self.layers.named_children():
            if isinstance(module, nn.Conv2d):
                found.append((f"conv-{module.out_channels}-{module.kernel_size[0]}", f"layers.{name}"))
            elif isinstance(module, nn.MaxPool2d):
                found.append(("pool", f"layers.{name}"))
            elif isinstance(module, nn.Linear):
                found.append((f"fc-{module.out_features}", f"layers.{name}"))
        return found[:-1]

    @classmethod
    def from_spec(cls, spec: Sequence[str], **settings: Any) -> Self:
        """The network of these words; `settings` as for the class."""
        return cls(spec, **settings)

    def settings(self) -> dict[str, Any]:
        """What else it takes to build the same form."""
        return {
            "classes": self.classes,
            "channels": self.channels,
            "size": self.size,
            "batch_norm": self.batch_norm,
        }

    @staticmethod
    def count_parameters(
        spec: Sequence[str], classes: int = 10, channels: int = 1, size: int = 8, batch_norm: bool = True
    ) -> int:
        """Number of parameters, by formula: ``(inputs k^2 + 2) outputs`` a layer with BatchNorm, + 1 with a bias."""
        total, width, edge, flat = 0, channels, size, False
        for kind, outputs, kernel in _words(spec):
            if kind == "pool":
                edge //= 2
                continue
            if kind == "fc" and not flat:
                width, flat = width * edge * edge, True
            total += (width * kernel * kernel + (2 if batch_norm else 1)) * outputs
            width = outputs
        return total + (width * (1 if flat else edge * edge) + 1) * classes


def _words(spec: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """Kind, outputs and kernel size of each word."""
    for word in spec:
        conv, units = _CONV.fullmatch(word), _FC.fullmatch(word)
        if conv and int(conv[2]) % 2:
            yield "conv", int(conv[1]), int(conv[2])
        elif units:
            yield "fc", int(units[1]), 1
        elif word == "pool":
            yield "pool", 0, 0
        else:
            raise InputError(f"spec: got {word!r}, expected conv-<filters>-<odd kernel>, fc-<units> or pool")


def _unit(kind: str, width: int, outputs: int, kernel: int, batch_norm: bool) -> list[nn.Module]:
    layer: nn.Module
    norm: nn.Module
    if kind == "conv":
        layer = nn.utils.skip_init(
            nn.Conv2d, width, outputs, kernel, padding=kernel // 2, bias=not batch_norm, device="cpu"
        )
        norm = nn.BatchNorm2d(outputs)
    else:
        layer = nn.utils.skip_init(nn.Linear, width, outputs, bias=not batch_norm, device="cpu")
        norm = nn.BatchNorm1d(outputs)
    return [layer, *([norm] if batch_norm else []), nn.ReLU()]


def _start_(model: nn.Module, generator: torch.Generator | None) -> None:
    """First weights, drawn from `generator` alone."""
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
