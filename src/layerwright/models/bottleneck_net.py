"""A convnet of inverted bottlenecks with any widths."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import mul
from typing import Literal

from torch import Tensor, nn

from layerwright.core.errors import InputError
from layerwright.models.backbone import check_images
from layerwright.nn.linear_bottleneck import LinearBottleneck, conv_norm

__all__ = ["BottleneckNet"]


class BottleneckNet(nn.Module):
    """A stem, inverted bottlenecks of any widths, a wide 1 x 1 convolution, the mean, a classifier.

    Give it the widths of `layerwright.allocate.linear_channels`, or any others.

    Args:
        channels: width of each block's output.
        strides: of each block.
        expansions: of each block; see `LinearBottleneck`.
        squeezed: whether a block has squeeze-excite; nowhere if left out.
        stem_channels, stem_stride: of the first convolution, 3 x 3.
        wide: channels before the mean.
        hidden: width of a layer between the mean and the classifier; None: no such layer.
        activation: ``silu``, or ``relu6``; behind stem, expansions and the last convolution.
        se_ratio: see `LinearBottleneck`.
        dropout: before the classifier.
        num_classes, in_channels: at least 1.

    Raises:
        InputError: lists of unequal length, or a number outside its range.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        expansions: Sequence[int],
        squeezed: Sequence[bool] | None = None,
        *,
        stem_channels: int = 32,
        stem_stride: int = 2,
        wide: int = 1280,
        hidden: int | None = None,
        activation: Literal["silu", "relu6"] = "silu",
        se_ratio: int = 12,
        dropout: float = 0.2,
        num_classes: int = 1000,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        squeezed = [False] * len(channels) if squeezed is None else squeezed
        lengths = [len(channels), len(strides), len(expansions), len(squeezed)]
        if not channels or len(set(lengths)) > 1:
            raise InputError(
                f"channels, strides, expansions, squeezed: got {lengths} entries, expected one for each of at least one block"
            )
        for name, value in (
            ("stem_channels", stem_channels), ("wide", wide), ("hidden", 1 if hidden is None else hidden),
            ("num_classes", num_classes), ("in_channels", in_channels), ("stem_stride", stem_stride),
        ):  # fmt: skip
            if value < 1:
                raise InputError(f"{name}: got {value}, expected at least 1")
        if not 0 <= dropout < 1:
            raise InputError(f"dropout: got {dropout}, expected a share in [0, 1)")
        self.in_channels = in_channels
        self.stem = conv_norm(in_channels, stem_channels, 3, stem_stride, activation=activation)
        inputs = [stem_channels, *channels]
        self.blocks = nn.ModuleList(
            LinearBottleneck(before, after, expand, stride, use_se, se_ratio, activation=activation)
            for before, after, expand, stride, use_se in zip(
                inputs, channels, expansions, strides, squeezed, strict=False
            )
        )
        self.wide = conv_norm(channels[-1], wide, activation=activation)
        self.hidden: nn.Module = (
            nn.Sequential(nn.Linear(wide, hidden), nn.BatchNorm1d(hidden), nn.ReLU6()) if hidden else nn.Identity()
        )
        self.dropout = nn.Dropout(dropout)
        self.num_features = hidden or wide
        self.classifier = nn.Linear(self.num_features, num_classes)
        reached = list(accumulate(strides, mul, initial=stem_stride))[1:]
        lasts = {stride: block for block, stride in enumerate(reached) if stride >= 4 or stride == reached[-1]}
        self._taken = set(lasts.values())
        self.feature_strides = tuple(lasts)
        self.feature_channels = tuple(channels[block] for block in lasts.values())

    def forward_features(self, images: Tensor) -> list[Tensor]:
        """The last map of each stride from 4 on, the finest first, before the wide convolution.

        Raises:
            TypeError, InputError: see `check_images`.
        """
        check_images(images, self.in_channels)
        x, maps = self.stem(images), []
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number in self._taken:
                maps.append(x)
        return maps

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(batch, num_classes)`` of ``(batch, in_channels, height, width)``."""
        pooled = self.wide(self.forward_features(images)[-1]).mean((2, 3))
        logits: Tensor = self.classifier(self.dropout(self.hidden(pooled)))
        return logits

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new linear layer of `num_classes` classes."""
        self.classifier = nn.Linear(self.num_features, num_classes).to(self.classifier.weight)

    def no_weight_decay(self) -> set[str]:
        """None: norms and biases are vectors, which do not decay anyway."""
        return set()
