"""The All Convolutional Net: strided convolutions for pooling, 1 x 1 convolutions and a mean for classification."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from torch import Tensor, nn

from layerwright.core.errors import InputError
from layerwright.models.backbone import check_images, named_config

__all__ = ["AllCNN"]

Variant = Literal["A", "B", "C"]
Kind = Literal["base", "strided", "convpool", "all"]
KINDS: tuple[Kind, ...] = ("base", "strided", "convpool", "all")
_STAGES: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "A": ((5,), (5,)),
    "B": ((5, 1), (5, 1)),
    "C": ((3, 3), (3, 3)),
}
"""Kernel sizes of the two stages before the tail."""


class AllCNN(nn.Module):
    """The networks of Springenberg et al., "Striving for Simplicity" (2015, arXiv 1412.6806), for small pictures.

    Two stages of 96 and 192 channels, each brought to half the resolution, then 3 x 3 without padding, two 1 x 1, and
    the mean over what is left. Every convolution has a bias and ReLU behind it.

    Args:
        variant: A: one 5 x 5 a stage; B: 5 x 5 and 1 x 1; C: twice 3 x 3.
        kind: how the resolution falls: ``base`` pools maxima of 3 x 3; ``strided`` gives the convolution before it
            stride 2 instead; ``all`` puts a convolution of 3 x 3 with stride 2 in the place of the pool; ``convpool``
            puts one with stride 1 before the pool, so that it has as many parameters as ``all``.
        in_channels: of the pictures.
        num_classes: at least 1.
        width_mult: times the channels, rounded.
        dropout: of the pictures and behind each halving.
        final_relu: ReLU before the mean as well.

    Raises:
        InputError: an unknown variant or kind, or numbers that leave no channel or class.
    """

    def __init__(
        self,
        variant: Variant = "C",
        kind: Kind = "all",
        in_channels: int = 3,
        num_classes: int = 10,
        width_mult: float = 1.0,
        dropout: tuple[float, float] = (0.2, 0.5),
        final_relu: bool = True,
    ) -> None:
        super().__init__()
        if variant not in _STAGES:
            raise InputError(f"variant: got {variant!r}, expected one of {', '.join(_STAGES)}")
        if kind not in KINDS:
            raise InputError(f"kind: got {kind!r}, expected one of {', '.join(KINDS)}")
        if num_classes < 1:
            raise InputError(f"num_classes: got {num_classes}, expected at least 1")
        widths = [round(width * width_mult) for width in (96, 192)]
        if min(widths) < 1:
            raise InputError(f"width_mult: got {width_mult}, which leaves no channels; use at least 1/96")
        self.variant, self.kind, self.in_channels, self.final_relu = variant, kind, in_channels, final_relu
        self.num_features = num_classes
        self.feature_strides, self.feature_channels = (4,), (num_classes,)
        layers: list[nn.Module] = [nn.Dropout(dropout[0])]
        channels = in_channels
        for kernels, width in zip(_STAGES[variant], widths, strict=True):
            for number, kernel in enumerate(kernels):
                stride = 2 if kind == "strided" and number == len(kernels) - 1 else 1
                layers += _convolution(channels, width, kernel, stride)
                channels = width
            if kind in ("all", "convpool"):
                layers += _convolution(width, width, 3, 2 if kind == "all" else 1)
            if kind in ("base", "convpool"):
                layers.append(nn.MaxPool2d(3, 2, 1))
            layers.append(nn.Dropout(dropout[1]))
        layers += [nn.Conv2d(channels, widths[1], 3), nn.ReLU(), *_convolution(widths[1], widths[1], 1, 1)]
        self.layers = nn.Sequential(*layers)
        self.classifier = nn.Conv2d(widths[1], num_classes, 1)

    @classmethod
    def from_config(cls, name: str, **changes: Any) -> Self:
        """A published network: ``a``, ``b`` or ``c`` and the kind, such as ``c_all``; or ``test``.

        Raises:
            InputError: no such network.
        """
        configs: dict[str, dict[str, Any]] = {
            f"{variant.lower()}_{kind}": {"variant": variant, "kind": kind} for variant in _STAGES for kind in KINDS
        }
        configs["test"] = {"width_mult": 0.25}
        return cls(**named_config(name, configs, changes))

    def forward_features(self, images: Tensor) -> list[Tensor]:
        """The map of class evidence ``(batch, num_classes, height, width)`` at stride 4, less the rim of one.

        Raises:
            TypeError, InputError: see `check_images`; pictures below 16 pixels a side.
        """
        check_images(images, self.in_channels, 16)
        evidence = self.classifier(self.layers(images))
        return [evidence.relu() if self.final_relu else evidence]

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(batch, num_classes)`` of ``(batch, in_channels, height, width)``."""
        return self.forward_features(images)[0].mean((2, 3))

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new last convolution of `num_classes` classes."""
        old = self.classifier
        self.classifier = nn.Conv2d(old.in_channels, num_classes, 1).to(old.weight)
        self.num_features, self.feature_channels = num_classes, (num_classes,)

    def no_weight_decay(self) -> set[str]:
        """None: biases are vectors, which do not decay anyway."""
        return set()


def _convolution(inputs: int, outputs: int, kernel: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2), nn.ReLU()]
