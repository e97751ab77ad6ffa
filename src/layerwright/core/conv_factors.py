"""What a factorised convolution consists of: its stages, their sizes, parameters and multiplications."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from layerwright.core.errors import InputError

if TYPE_CHECKING:
    from layerwright.core.treatment import FactorConv

__all__ = ["ConvShape", "Stage", "check_factor", "factored_weights", "largest_rank", "stage_shapes", "stages"]


@dataclass(frozen=True)
class Stage:
    """One convolution of a chain that takes the place of another.

    Attributes:
        in_channels, out_channels, groups: as in `torch.nn`.
        height, width: whether it has the original's kernel, stride and padding along that axis; 1, 1 and 0 otherwise.
    """

    in_channels: int
    out_channels: int
    groups: int = 1
    height: bool = False
    width: bool = False


@dataclass(frozen=True)
class ConvShape:
    """Sizes of one convolution (a linear layer has kernel and maps of 1 x 1).

    Attributes:
        in_channels, out_channels, groups: as in `torch.nn`.
        kernel, stride: ``(height, width)``.
        in_size, out_size: of the maps ``(height, width)``, without padding.
    """

    in_channels: int
    out_channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    in_size: tuple[int, int]
    out_size: tuple[int, int]
    groups: int = 1

    @property
    def params(self) -> int:
        """Number of weights, without bias."""
        return self.out_channels * (self.in_channels // self.groups) * self.kernel[0] * self.kernel[1]

    @property
    def macs(self) -> int:
        """Multiply-adds of one sample."""
        return self.params * self.out_size[0] * self.out_size[1]


def stages(factor: FactorConv, out_channels: int, in_channels: int) -> tuple[Stage, ...]:
    """The chain that `factor` makes of a convolution ``in_channels -> out_channels``, in order of execution.

    Without a nonlinearity between them: scheme 2 takes columns, then rows of the kernel; scheme 4 the whole kernel to
    `groups` times the rank, then all of these to the outputs; scheme 5 the other way round; CP the inputs, rows,
    columns and outputs one after the other. Source: Yu and Bouganis (2023), Mixed-TD.
    """
    r, g = factor.inner, factor.groups
    if factor.method == "cp":
        return (
            Stage(in_channels, r),
            Stage(r, r, r, height=True),
            Stage(r, r, r, width=True),
            Stage(r, out_channels),
        )
    if factor.scheme == 2:
        return Stage(in_channels, r, width=True), Stage(r, out_channels, height=True)
    if factor.scheme == 4:
        return Stage(in_channels, g * r, g, height=True, width=True), Stage(g * r, out_channels)
    return Stage(in_channels, g * r), Stage(g * r, out_channels, g, height=True, width=True)


def largest_rank(factor: FactorConv, out_channels: int, in_channels: int) -> int:
    """The rank at which nothing is lost: the smaller side of what is decomposed, for CP all sizes but the largest."""
    kh, kw = factor.kernel_height, factor.kernel_width
    if factor.method == "cp":
        sizes = sorted((out_channels, in_channels, kh, kw))
        return sizes[0] * sizes[1] * sizes[2]
    if factor.scheme == 2:
        return min(out_channels * kh, in_channels * kw)
    if factor.scheme == 4:
        return min(out_channels, in_channels // factor.groups * kh * kw)
    return min(in_channels, out_channels // factor.groups * kh * kw)


def check_factor(factor: FactorConv, out_channels: int, in_channels: int, name: str = "layer") -> None:
    """Refuse a factorisation that a convolution ``in_channels -> out_channels`` cannot have.

    Raises:
        InputError: groups that do not divide the channels, a rank above `largest_rank`, CP of a 1 x 1 kernel; names
            the layer.
    """
    side, channels = ("inputs", in_channels) if factor.scheme == 4 else ("outputs", out_channels)
    if channels % factor.groups:
        raise InputError(f"{name}: groups: {factor.groups} does not divide its {channels} {side}; use a divisor")
    if factor.method == "cp" and factor.kernel_height * factor.kernel_width == 1:
        raise InputError(f"{name}: method: cp is for kernels larger than 1 x 1; use svd")
    most = largest_rank(factor, out_channels, in_channels)
    if factor.inner > most:
        raise InputError(f"{name}: inner: rank {factor.inner} is above {most}, at which nothing is lost")


def factored_weights(factor: FactorConv, out: int, in_: int, name: str = "layer") -> int:
    """Number of weights in all stages, for a weight that is seen as a matrix ``(out, in channels * kernel)``.

    Raises:
        InputError: the matrix is not one of such a kernel, or `check_factor` refuses.
    """
    area = factor.kernel_height * factor.kernel_width
    if in_ % area:
        raise InputError(
            f"{name}: kernel: {factor.kernel_height} x {factor.kernel_width} does not fit its {in_} columns; "
            "give the layer's own kernel size"
        )
    check_factor(factor, out, in_ // area, name)
    return sum(
        stage.out_channels
        * (stage.in_channels // stage.groups)
        * (factor.kernel_height if stage.height else 1)
        * (factor.kernel_width if stage.width else 1)
        for stage in stages(factor, out, in_ // area)
    )


def stage_shapes(factor: FactorConv, shape: ConvShape) -> tuple[ConvShape, ...]:
    """Sizes of every stage: an axis has the input's size until the stage that has the kernel of this axis.

    Raises:
        InputError: `shape` is grouped.
    """
    if shape.groups != 1:
        raise InputError(f"groups: a convolution of {shape.groups} groups is not factorised")
    found = []
    before = shape.in_size
    for stage in stages(factor, shape.out_channels, shape.in_channels):
        own = (stage.height, stage.width)
        after = _where(own, shape.out_size, before)
        found.append(
            ConvShape(
                stage.in_channels,
                stage.out_channels,
                _where(own, shape.kernel, (1, 1)),
                _where(own, shape.stride, (1, 1)),
                before,
                after,
                stage.groups,
            )
        )
        before = after
    return tuple(found)


def _where(own: tuple[bool, bool], yes: tuple[int, int], no: tuple[int, int]) -> tuple[int, int]:
    return yes[0] if own[0] else no[0], yes[1] if own[1] else no[1]
