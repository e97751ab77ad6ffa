"""Convolutional Hough matching: candidate matches of two images vote for one another, in 4-D and in 6-D."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from layerwright.core.errors import InputError
from layerwright.nn.hough_groups import HoughKind, SharedKernel, group_numbers

__all__ = ["CHM4d", "CHM6d", "CenterPivotConv4d"]

_FEW = 8
"""Below so many channels a convolution runs over bands: vector units would be idle otherwise."""


class CHM4d(nn.Module):
    """4-D convolution of a correlation whose kernel looks at distances only, hence tens of weights and not hundreds.

    ``out(x, x') = b + sum over p, q of K(p, q) C(x + p, x' + q)`` with zeros outside, where entries of K that `kind`
    takes for equal are one weight over the size of their group. 55 weights for ``psi``, 15 for ``iso`` and 625 for
    ``full`` at side 5. Cost: ``N^2 k^4`` multiply-adds for maps of N cells, ``2 N^2 k^2`` with `center_pivot`; memory:
    a few times the correlation.

    First values: entries ``|normal(0, 1e-3)|``, the smallest ones at the corners of the kernel and the largest at its
    centre. (The released code means to do so; its line for this layer changes a copy, so that weights start unsorted
    and without the size of the group.) ``full``: ``|uniform(-1, 1)| / k^2``. The bias starts at 0.

    Source: Min and Cho, "Convolutional Hough Matching Networks" (2021, arXiv 2103.16831); center-pivot: Min, Kim and
    Cho, "Convolutional Hough Matching Networks for Robust and Efficient Visual Correspondence" (2021, arXiv 2109.05221).

    Args:
        kernel_size: k, odd.
        kind: ``psi`` (position-sensitive isotropic), ``iso`` or ``full``; see `chm_groups`.
        center_pivot: keep the entries with ``p = 0`` or ``q = 0`` alone.
        bias: add a number.
        generator: of the first values.

    Raises:
        InputError: an even kernel size, or an unknown kind.
    """

    def __init__(
        self,
        kernel_size: int = 5,
        kind: HoughKind = "psi",
        center_pivot: bool = False,
        bias: bool = True,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.kernel_size, self.kind, self.center_pivot = kernel_size, kind, center_pivot
        self.kernel = SharedKernel(group_numbers(kernel_size, kind, center_pivot), (kernel_size,) * 4)
        self.bias = nn.Parameter(torch.zeros(1)) if bias else None
        _start_(self.kernel, kind, 1.0, True, generator)

    def dense_kernel(self) -> Tensor:
        """The kernel ``(k, k, k, k)``: two axes for offsets in the first map, two for those in the second."""
        kernel: Tensor = self.kernel()
        return kernel

    def forward(self, corr: Tensor) -> Tensor:
        """Votes for a correlation ``(batch, 1, height, width, height', width')``, of the same shape.

        Raises:
            InputError: another shape, or an empty batch.
        """
        _check(corr, 6, "(batch, 1, height, width, height', width')")
        weight = self.dense_kernel()[None, None].to(corr.dtype)
        return _with_bias(_vote(corr, weight, self.center_pivot), self.bias)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"kernel_size={self.kernel_size}, kind={self.kind!r}, center_pivot={self.center_pivot}"


class CHM6d(nn.Module):
    """6-D convolution over scales and places of both images; see `CHM4d`.

    ``out(s, s', x, x') = b + sum of K(ds, ds', p, q) C(s + ds, s' + ds', x + p, x' + q)``. The scale offsets share by the
    same rule as places do: for 3 scales 4 groups (``psi``) or 3 (``iso``), so 220 or 45 weights and 5625 for ``full``.
    Cost: ``S^4 N^2 k^4`` multiply-adds for S scales where the scale kernel reaches all of them, ``2 S^4 N^2 k^2`` with
    `center_pivot`, which is about the places and keeps every scale offset. The pairs of scales are the channels of one
    4-D convolution.

    First values: entries ``|normal(0, 1e-3)|``, unsorted; ``full``: ``1e-3 |uniform(-1, 1)| / (scale_kernel k^2)``.

    Source: Min and Cho (2021, arXiv 2103.16831).

    Args:
        scale_kernel: odd number of scale offsets.
        kernel_size, kind, center_pivot, bias, generator: as for `CHM4d`.

    Raises:
        InputError: an even size, or an unknown kind.
    """

    def __init__(
        self,
        scale_kernel: int = 3,
        kernel_size: int = 5,
        kind: HoughKind = "psi",
        center_pivot: bool = False,
        bias: bool = True,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.scale_kernel, self.kernel_size = scale_kernel, kernel_size
        self.kind, self.center_pivot = kind, center_pivot
        places = group_numbers(kernel_size, kind, center_pivot)
        count = max(places) + 1
        numbers = [
            -1 if place < 0 else scale * count + place
            for scale in group_numbers(scale_kernel, kind, dims=1)
            for place in places
        ]
        self.kernel = SharedKernel(numbers, (scale_kernel,) * 2 + (kernel_size,) * 4)
        self.bias = nn.Parameter(torch.zeros(1)) if bias else None
        _start_(self.kernel, kind, 1e-3, False, generator)

    def dense_kernel(self) -> Tensor:
        """The kernel ``(scale_kernel, scale_kernel, k, k, k, k)``."""
        kernel: Tensor = self.kernel()
        return kernel

    def forward(self, corr: Tensor) -> Tensor:
        """Votes for a correlation ``(batch, 1, S, S', height, width, height', width')``, of the same shape.

        Raises:
            InputError: another shape, or an empty batch.
        """
        _check(corr, 8, "(batch, 1, S, S', height, width, height', width')")
        scales = corr.shape[2:4]
        weight = _between_scales(self.dense_kernel().to(corr.dtype), *scales)
        votes = _vote(corr[:, 0].flatten(1, 2), weight, self.center_pivot)
        return _with_bias(votes.unflatten(1, (1, *scales)), self.bias)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return (
            f"scale_kernel={self.scale_kernel}, kernel_size={self.kernel_size}, kind={self.kind!r}, "
            f"center_pivot={self.center_pivot}"
        )


class CenterPivotConv4d(nn.Module):
    """A 4-D convolution of several channels that moves in one image at a time: two 2-D convolutions, added.

    Cost: ``2 N^2 k^2`` multiply-adds for each pair of channels, where a full kernel takes ``N^2 k^4``. With a stride the
    axes that a convolution does not move along are thinned out first.

    Source: Min, Kang and Cho, "Hypercorrelation Squeeze for Few-Shot Segmentation" (2021, arXiv 2104.01538).

    Args:
        in_channels: of the correlation.
        out_channels: of the result.
        kernel_size: odd side of both kernels.
        stride: in the first image and in the second, or one number for both.
        bias: of both convolutions.

    Raises:
        InputError: an even kernel size, or a number below 1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int | tuple[int, int] = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        strides = (stride, stride) if isinstance(stride, int) else tuple(stride)
        if min(in_channels, out_channels, *strides) < 1:
            raise InputError(
                f"in_channels, out_channels, stride: got {in_channels}, {out_channels}, {strides}, expected at least 1"
            )
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise InputError(f"kernel_size: got {kernel_size}, expected an odd number, so that there is a centre")
        self.in_channels, self.stride = in_channels, strides
        self.conv1, self.conv2 = (
            nn.Conv2d(in_channels, out_channels, kernel_size, step, kernel_size // 2, bias=bias) for step in strides
        )

    def forward(self, corr: Tensor) -> Tensor:
        """``(batch, in_channels, height, width, height', width')`` to ``(batch, out_channels, ...)``; a stride s leaves ``ceil(n / s)``.

        Raises:
            InputError: another shape, or an empty batch.
        """
        _check(corr, 6, f"(batch, {self.in_channels}, height, width, height', width')", self.in_channels)
        first, second = self.stride
        moved_first = _fold(self.conv1, corr[..., ::second, ::second].permute(0, 4, 5, 1, 2, 3))
        moved_second = _fold(self.conv2, corr[:, :, ::first, ::first].permute(0, 2, 3, 1, 4, 5))
        return moved_first.permute(0, 3, 4, 5, 1, 2) + moved_second.permute(0, 3, 1, 2, 4, 5)


def _start_(
    kernel: SharedKernel, kind: HoughKind, small: float, ascending: bool, generator: torch.Generator | None
) -> None:
    if kind == "full" and not kernel.weight.is_meta:
        with torch.no_grad():
            uniform = torch.rand(kernel.weight.shape, generator=generator)
            kernel.weight.copy_(uniform * small / math.sqrt(math.prod(kernel.shape)))
    else:
        kernel.start_(ascending, generator)


def _check(corr: Tensor, dims: int, wanted: str, channels: int = 1) -> None:
    if not corr.is_floating_point():
        raise TypeError(f"corr: got {corr.dtype}, expected floating-point numbers; convert them first")
    if corr.dim() != dims or corr.shape[1] != channels or not corr.numel():
        raise InputError(f"corr: got shape {tuple(corr.shape)}, expected {wanted}, none of them 0")


def _with_bias(votes: Tensor, bias: Tensor | None) -> Tensor:
    return votes if bias is None else votes + bias.to(votes.dtype)


def _fold(conv: nn.Conv2d, maps: Tensor) -> Tensor:
    """Convolve ``(batch, n, m, channels, height, width)`` as a batch of pictures."""
    out: Tensor = conv(maps.flatten(0, 2))
    return out.unflatten(0, maps.shape[:3])


def _between_scales(kernel: Tensor, first: int, second: int) -> Tensor:
    """A weight ``(S S', S S', k, k, k, k)`` from each pair of scales to each other, from a kernel over scale offsets."""
    size = kernel.shape[0]
    padded = functional.pad(kernel, (0, 0) * 4 + (0, 1, 0, 1))
    here, there = _offsets(first, size, kernel.device), _offsets(second, size, kernel.device)
    # (out, in, out', in', k, k, k, k)
    spread = padded[here[:, :, None, None], there[None, None]]
    return spread.transpose(1, 2).flatten(0, 1).flatten(1, 2)


def _offsets(count: int, size: int, device: torch.device) -> Tensor:
    """Place in a kernel of `size` entries of the offset from output ``i`` to input ``j``; `size` where it reaches no further."""
    places = torch.arange(count, device=device)
    offset = places[None] - places[:, None] + size // 2
    return torch.where((offset >= 0) & (offset < size), offset, size)


def _vote(corr: Tensor, weight: Tensor, center_pivot: bool) -> Tensor:
    """4-D convolution of ``(batch, in, height, width, height', width')`` with ``(out, in, k, k, k, k)``, zeros outside."""
    if center_pivot:
        return _pivot(corr, weight)
    return _banded(corr, weight) if corr.shape[1] < _FEW else _by_rows(corr, weight)


def _by_rows(corr: Tensor, weight: Tensor) -> Tensor:
    """The k rows around each row of the first map as channels of a 3-D convolution: k times the memory."""
    batch, _, height = corr.shape[:3]
    side = weight.shape[-1]
    rows = functional.pad(corr.permute(2, 0, 1, 3, 4, 5), (0, 0) * 5 + (side // 2, side // 2)).unfold(0, side, 1)
    rows = rows.permute(0, 1, 2, 6, 3, 4, 5).flatten(2, 3).flatten(0, 1)
    out = functional.conv3d(rows, weight.flatten(1, 2), padding=side // 2)
    return out.unflatten(0, (height, batch)).permute(1, 2, 0, 3, 4, 5)


def _banded(corr: Tensor, weight: Tensor) -> Tensor:
    """The last axis as channels of a 3-D convolution, whose weight is a band matrix along it."""
    width = corr.shape[-1]
    moved = corr.permute(0, 1, 5, 2, 3, 4).flatten(1, 2)
    out = functional.conv3d(moved, _band(weight, width), padding=weight.shape[-1] // 2)
    return out.unflatten(1, (-1, width)).permute(0, 1, 3, 4, 5, 2)


def _pivot(corr: Tensor, weight: Tensor) -> Tensor:
    """Votes of one image at a time: the entries with no offset in the other one, the centre counted once."""
    size = corr.shape
    middle = weight.shape[-1] // 2
    other = torch.ones(weight.shape[2:4], dtype=torch.bool, device=weight.device)
    other[middle, middle] = False
    first, second = weight[..., middle, middle] * other, weight[:, :, middle, middle]
    # (batch, channels width', cells, height') and (batch, channels width, height, cells')
    right = corr.permute(0, 1, 5, 2, 3, 4).flatten(3, 4).flatten(1, 2)
    left = corr.permute(0, 1, 3, 2, 4, 5).flatten(4, 5).flatten(1, 2)
    moved = functional.conv2d(right, _band(second, size[5])[:, :, None], padding=(0, middle))
    out = moved.unflatten(1, (-1, size[5])).unflatten(3, size[2:4]).permute(0, 1, 3, 4, 5, 2)
    moved = functional.conv2d(left, _band(first, size[3])[..., None], padding=(middle, 0))
    return out + moved.unflatten(1, (-1, size[3])).unflatten(4, size[4:]).permute(0, 1, 3, 2, 4, 5)


def _band(weight: Tensor, length: int) -> Tensor:
    """``(out, in, ..., k)`` to ``(out length, in length, ...)``: the last axis of the kernel as a band matrix, a longer one cut."""
    spare = length - 1 - weight.shape[-1] // 2
    bands = functional.pad(weight, (spare, spare)).unfold(-1, length, 1).flip(-2).movedim((-2, -1), (1, 3))
    return bands.flatten(2, 3).flatten(0, 1)
