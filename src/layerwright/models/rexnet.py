"""ReXNet: inverted bottlenecks whose width grows by the same step from block to block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any, Self

from torch import Tensor

from layerwright.allocate.channel_schedule import divisible, sloped_channels
from layerwright.core.errors import InputError
from layerwright.models.backbone import Rule, load_official_, named_config
from layerwright.models.bottleneck_net import BottleneckNet

__all__ = ["LITE_RULES", "REXNET_RULES", "ReXNet", "ReXNetLite"]

_REPEATS = (1, 2, 2, 3, 3, 5)
_STRIDES = (1, 2, 2, 2, 1, 2)
_SQUEEZED = (False, False, True, True, True, True)


class ReXNet(BottleneckNet):
    """The networks of Han et al., "Rethinking Channel Dimensions for Efficient Model Design" (2021, arXiv 2007.00992).

    16 blocks in stages of 1, 2, 2, 3, 3, 5; widths from 16 on, 11.25 more in each block, times `width_mult`; SiLU behind
    expansions, squeeze-excite from the third stage on. Below 1, `width_mult` leaves stem and first width as they are.

    Args:
        width_mult: above 0; published: 0.9, 1.0, 1.3, 1.5, 2.0, 2.2, 3.0.
        depth_mult: blocks of each stage, rounded up; the last width stays about the same.
        use_se, se_ratio: see `LinearBottleneck`.
        dropout, num_classes, in_channels: see `BottleneckNet`.

    Raises:
        InputError: a number outside its range.
    """

    def __init__(
        self,
        width_mult: float = 1.0,
        depth_mult: float = 1.0,
        *,
        use_se: bool = True,
        se_ratio: int = 12,
        dropout: float = 0.2,
        num_classes: int = 1000,
        in_channels: int = 3,
    ) -> None:
        if not width_mult > 0:
            raise InputError(f"width_mult: got {width_mult}, expected a positive number")
        if not depth_mult > 0:
            raise InputError(f"depth_mult: got {depth_mult}, expected a positive number")
        repeats = [ceil(number * depth_mult) for number in _REPEATS]
        depth = sum(repeats)
        stem = 32 / width_mult if width_mult < 1 else 32
        super().__init__(
            sloped_channels(depth, 16, 180 / depth, width_mult),
            _first_of(repeats, _STRIDES, 1),
            [1] * repeats[0] + [6] * (depth - repeats[0]),
            [use_se and squeezed for squeezed, number in zip(_SQUEEZED, repeats, strict=True) for _ in range(number)],
            stem_channels=round(stem * width_mult),
            wide=int(1280 * width_mult),
            se_ratio=se_ratio, dropout=dropout, num_classes=num_classes, in_channels=in_channels,
        )  # fmt: skip

    @classmethod
    def from_config(cls, name: str, **changes: Any) -> Self:
        """A published network, ``x0.9``, ``x1.0``, ``x1.3``, ``x1.5``, ``x2.0``, ``x2.2`` or ``x3.0``; or ``test``.

        Raises:
            InputError: no such network.
        """
        configs: dict[str, dict[str, Any]] = {
            f"x{width}": {"width_mult": width} for width in (0.9, 1.0, 1.3, 1.5, 2.0, 2.2, 3.0)
        }
        configs["test"] = {"width_mult": 0.1, "num_classes": 10}
        return cls(**named_config(name, configs, changes))

    def load_official_(self, state: Mapping[str, Tensor]) -> None:
        """Copy the weights of an official checkpoint of this width (``rexnetv1_*.pth``), in place.

        Raises:
            CheckpointError: names or shapes that do not fit.
        """
        load_official_(self, state, REXNET_RULES, reshape=_without_positions)


class ReXNetLite(BottleneckNet):
    """ReXNet without squeeze-excite, with ReLU6 everywhere and widths that are multiples of 8 (Han et al., 2021).

    Widths from 16 on, 164 / 15 more in each block, times `multiplier`; behind the mean a layer of 1024 units.

    Args:
        multiplier: above 0; published: 1.0, 1.3, 1.5, 2.0.
        divisor: of all widths of stem and blocks.
        dropout, num_classes, in_channels: see `BottleneckNet`.

    Raises:
        InputError: a number outside its range.
    """

    def __init__(
        self,
        multiplier: float = 1.0,
        *,
        divisor: int = 8,
        dropout: float = 0.2,
        num_classes: int = 1000,
        in_channels: int = 3,
    ) -> None:
        if not multiplier > 0:
            raise InputError(f"multiplier: got {multiplier}, expected a positive number")
        depth = sum(_REPEATS)
        stem = 32 / multiplier if multiplier < 1 else 32
        super().__init__(
            sloped_channels(depth, 16, 164 / (depth - 1), multiplier, divisor),
            _first_of(_REPEATS, _STRIDES, 1),
            [1] * _REPEATS[0] + [6] * (depth - _REPEATS[0]),
            stem_channels=divisible(round(stem * multiplier), divisor),
            wide=int(1280 * multiplier) if multiplier > 1 else 1280,
            hidden=1024, activation="relu6", dropout=dropout, num_classes=num_classes, in_channels=in_channels,
        )  # fmt: skip

    @classmethod
    def from_config(cls, name: str, **changes: Any) -> Self:
        """A published network, ``x1.0``, ``x1.3``, ``x1.5`` or ``x2.0``.

        Raises:
            InputError: no such network.
        """
        configs = {f"x{width}": {"multiplier": width} for width in (1.0, 1.3, 1.5, 2.0)}
        return cls(**named_config(name, configs, changes))

    def load_official_(self, state: Mapping[str, Tensor]) -> None:
        """Copy the weights of an official checkpoint of this width (``rexnet_lite_*.pth``), in place.

        Raises:
            CheckpointError: names or shapes that do not fit.
        """
        load_official_(self, state, LITE_RULES, reshape=_without_positions)


def _first_of(repeats: Sequence[int], values: Sequence[int], others: int) -> list[int]:
    """`values` for the first block of each stage, `others` for the rest."""
    return [
        value if not place else others for number, value in zip(repeats, values, strict=True) for place in range(number)
    ]


def _without_positions(name: str, tensor: Tensor) -> Tensor:
    """1 x 1 convolutions behind the mean are linear layers here."""
    return tensor.flatten(1) if name.startswith(("classifier.", "hidden.")) and tensor.dim() == 4 else tensor


def _rules(squeezed_from: int, classifier: Sequence[Rule]) -> list[Rule]:
    """Official names of 16 blocks are numbers in lists of layers whose length depends on the block."""
    rules: list[Rule] = [(r"^features\.0\.", "stem.conv."), (r"^features\.1\.", "stem.norm.")]
    for block in range(16):
        names = ["depthwise.conv", "depthwise.norm", "", "project.conv", "project.norm"]
        if block >= squeezed_from:
            names.insert(2, "se")
        if block:
            names = ["expand.conv", "expand.norm", "", *names]
        rules += [
            (rf"^features\.{block + 3}\.out\.{place}\.", f"blocks.{block}.{name}.")
            for place, name in enumerate(names)
            if name
        ]
    rules += [(rf"\.se\.fc\.{place}\.", f".se.{name}.") for place, name in ((0, "reduce"), (1, "norm"), (3, "expand"))]
    return [*rules, (r"^features\.19\.", "wide.conv."), (r"^features\.20\.", "wide.norm."), *classifier]


REXNET_RULES: list[Rule] = _rules(3, [(r"^output\.1\.", "classifier.")])
"""From the names of clovaai/rexnet, ``rexnetv1.py``."""
LITE_RULES: list[Rule] = _rules(
    16, [(r"^output\.0\.", "hidden.0."), (r"^output\.1\.", "hidden.1."), (r"^output\.4\.", "classifier.")]
)
"""From the names of clovaai/rexnet, ``rexnetv1_lite.py``."""
