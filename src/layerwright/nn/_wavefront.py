"""Triangular systems of padded convolutions, solved one anti-diagonal at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.grad import conv2d_weight

from layerwright.core.errors import InputError

__all__ = ["CORNERS", "Corner", "matrix_inverse", "sequential_inverse", "to_top_left", "wavefront_inverse"]

Corner = Literal["TL", "TR", "BL", "BR"]
CORNERS: tuple[Corner, ...] = ("TL", "TR", "BL", "BR")
"""Where the zeros are padded: top or bottom, left or right."""
Step = Callable[[int], None]
_FLIPPED: dict[str, tuple[int, ...]] = {"TL": (), "TR": (-1,), "BL": (-2,), "BR": (-2, -1)}


def to_top_left(x: Tensor, corner: Corner) -> Tensor:
    """A map or kernel of a `corner` as one of the corner TL, and back: the last two axes are turned around."""
    axes = _FLIPPED[corner]
    return x.flip(axes) if axes else x


def wavefront_inverse(
    y: Tensor, weight: Tensor, corner: Corner | Sequence[Corner] = "TL", on_step: Step | None = None
) -> Tensor:
    """The map `x` whose padded convolution with `weight` is `y`, in ``height + width - 1`` steps.

    With zeros on the top and left, ``y[:, i, j] = T x[:, i, j] + sum over the other taps W_ab x[:, i - a, j - b]``, and
    all positions of an anti-diagonal ``i + j = d`` depend on earlier ones alone: a step solves them together, for the
    whole batch and all corners. Gradients of any order reach `y` and `weight`; the backward pass is a wavefront too.

    Source: Kallappa et al., "FInC Flow" (2023, arXiv 2301.09266), algorithms 1 and 2.

    Args:
        y: ``(batch, corners * channels, height, width)``. Half-precision maps are solved in float32.
        weight: ``(channels, channels, k, k)``, or ``(corners, channels, channels, k, k)``; the tap on the pixel itself,
            in the corner of the kernel that faces away from the padding, is lower triangular without zeros on its
            diagonal; what is above the diagonal is not read.
        corner: one for all channels, or one for each group of channels.
        on_step: called with the number of each step.

    Returns:
        `x`, of the shape and dtype of `y`.

    Raises:
        InputError: shapes that do not fit, an unknown corner, or weights that are not finite or have a zero on a channel's own pixel.
    """
    weight, corners = _checked(y, weight, corner)
    maps = _split(y, corners).to(torch.promote_types(y.dtype, torch.float32))
    kernels = torch.stack([to_top_left(w, c) for w, c in zip(weight, corners, strict=True)]).to(maps.dtype)
    return _joined(_Wavefront.apply(maps, kernels, False, on_step), corners).to(y.dtype)  # type: ignore[no-untyped-call]


class _Wavefront(torch.autograd.Function):
    """Maps ``(corners, batch, channels, height, width)`` and kernels ``(corners, channels, channels, k, k)``, all TL."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, kernels: Tensor, upper: bool, on_step: Step | None) -> Tensor:
        x = _solve(y, kernels, upper, on_step)
        ctx.save_for_backward(x, kernels)
        ctx.upper = upper
        return x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, kernels = ctx.saved_tensors
        # The transposed system runs from the opposite corner with each tap's matrix transposed.
        turned = gradients[0].flip(-2, -1)
        solved: Tensor = _Wavefront.apply(turned, kernels.transpose(1, 2), not ctx.upper, None)  # type: ignore[no-untyped-call]
        of_y = solved.flip(-2, -1)
        of_kernels = -_kernel_gradient(x, of_y, kernels.shape[-1]) if ctx.needs_input_grad[1] else None
        if of_kernels is not None:
            pivot = of_kernels[..., -1, -1]
            kept = torch.triu(pivot) if ctx.upper else torch.tril(pivot)
            of_kernels = torch.cat([of_kernels.flatten(-2)[..., :-1], kept[..., None]], -1).view_as(of_kernels)
        return of_y, of_kernels, None, None


def _solve(y: Tensor, kernels: Tensor, upper: bool, on_step: Step | None) -> Tensor:
    groups, batch, channels, height, width = y.shape
    k = kernels.shape[-1]
    eye = torch.eye(channels, dtype=y.dtype, device=y.device).expand(groups, -1, -1)
    inverse = torch.linalg.solve_triangular(kernels[..., -1, -1], eye, upper=upper)
    # For each row of taps, one matrix from (tap, channel) to channel, with the inverse of the pivot already in it.
    rows = torch.einsum("goi,gicuv->guvco", inverse, kernels)
    taps = [rows[:, u].flatten(1, 2) for u in range(k - 1)] + [rows[:, k - 1, : k - 1].flatten(1, 2)]
    # A line of the buffer is a row of the picture, shifted by its number: an anti-diagonal is a column of the buffer,
    # and taps that lie side by side in the picture do so in the buffer. What lies outside of the picture stays zero.
    high, deep = height + k - 1, height + width - 1 + 2 * (k - 1)
    buffer = y.new_zeros(groups, high, batch, deep, channels)
    whole, line, sample = high * batch * deep * channels, batch * deep * channels, deep * channels
    start = (k - 1) * line + 2 * (k - 1) * channels
    skewed = buffer.as_strided(
        (groups, height, batch, width, channels), (whole, line + channels, sample, channels, 1), start
    )
    skewed.copy_(torch.einsum("goi,gbihw->ghbwo", inverse, y))
    for d in range(height + width - 1):
        low, top = max(0, d - width + 1), min(height, d + 1)
        count = (top - low) * batch
        solved = buffer.as_strided(
            (groups, count, channels), (whole, sample, 1), low * line + start + d * channels
        )  # fmt: skip
        for u, matrix in enumerate(taps):
            a = k - 1 - u
            if matrix.shape[1]:
                known = buffer.as_strided(
                    (groups, count, matrix.shape[1]), (whole, sample, 1),
                    (low - a) * line + start + (d - a - (k - 1)) * channels,
                )  # fmt: skip
                solved.baddbmm_(known, matrix, alpha=-1)
        if on_step:
            on_step(d)
    return skewed.permute(0, 2, 4, 1, 3)


def _kernel_gradient(x: Tensor, gradient: Tensor, k: int) -> Tensor:
    """Sums over positions of ``gradient[o, p] x[c, p - (a, b)]`` as kernels ``(corners, channels, channels, k, k)``."""
    groups, batch, channels, height, width = x.shape
    padded = functional.pad(x, (k - 1, 0, k - 1, 0)).transpose(0, 1).flatten(1, 2)
    shape = (groups * channels, channels, k, k)
    outward = gradient.transpose(0, 1).reshape(batch, groups * channels, height, width)
    found: Tensor = conv2d_weight(padded, shape, outward, groups=groups)  # type: ignore[no-untyped-call]
    return found.view(groups, channels, channels, k, k)


@torch.no_grad()
def sequential_inverse(
    y: Tensor, weight: Tensor, corner: Corner | Sequence[Corner] = "TL", on_step: Step | None = None
) -> Tensor:
    """As `wavefront_inverse`, pixel by pixel, corner by corner, by forward substitution: what a wavefront is measured by.

    Takes ``corners * height * width`` steps; has no gradients.
    """
    weight, corners = _checked(y, weight, corner)
    maps, k, step = _split(y, corners).to(torch.promote_types(y.dtype, torch.float32)), weight.shape[-1], 0
    solved = []
    for number, (part, name) in enumerate(zip(maps, corners, strict=True)):
        kernel = to_top_left(weight[number], name).to(part.dtype)
        pivot, others = kernel[..., -1, -1], kernel.clone()
        others[..., -1, -1] = 0
        matrix = others.flatten(1).T.contiguous()
        x = functional.pad(torch.zeros_like(part), (k - 1, 0, k - 1, 0))
        for i in range(part.shape[2]):
            for j in range(part.shape[3]):
                known = x[:, :, i : i + k, j : j + k].flatten(1) @ matrix
                x[:, :, i + k - 1, j + k - 1] = torch.linalg.solve_triangular(
                    pivot, (part[:, :, i, j] - known).T, upper=False
                ).T
                if on_step:
                    on_step(step)
                step += 1
        solved.append(x[:, :, k - 1 :, k - 1 :])
    return _joined(torch.stack(solved), corners).to(y.dtype)


def matrix_inverse(y: Tensor, weight: Tensor, corner: Corner | Sequence[Corner] = "TL") -> Tensor:
    """As `wavefront_inverse`, with the whole triangular matrix of ``channels * height * width`` rows, for small maps."""
    weight, corners = _checked(y, weight, corner)
    maps = _split(y, corners).to(torch.promote_types(y.dtype, torch.float32))
    batch, channels, height, width = maps.shape[1:]
    size, k = channels * height * width, weight.shape[-1]
    solved = []
    for number, (part, name) in enumerate(zip(maps, corners, strict=True)):
        kernel = to_top_left(weight[number], name).to(part.dtype)
        # Channels are the fastest axis of the raster, so that the matrix is triangular.
        basis = torch.eye(size, dtype=part.dtype, device=part.device).view(size, height, width, channels)
        columns = functional.conv2d(functional.pad(basis.permute(0, 3, 1, 2), (k - 1, 0, k - 1, 0)), kernel)
        matrix = columns.permute(0, 2, 3, 1).reshape(size, size).T
        right = part.permute(2, 3, 1, 0).reshape(size, batch)
        found = torch.linalg.solve_triangular(matrix, right, upper=False)
        solved.append(found.view(height, width, channels, batch).permute(3, 2, 0, 1))
    return _joined(torch.stack(solved), corners).to(y.dtype)


def _split(y: Tensor, corners: Sequence[Corner]) -> Tensor:
    return torch.stack([to_top_left(part, c) for part, c in zip(y.chunk(len(corners), 1), corners, strict=True)])


def _joined(maps: Tensor, corners: Sequence[Corner]) -> Tensor:
    return torch.cat([to_top_left(part, c) for part, c in zip(maps, corners, strict=True)], 1)


def _checked(y: Tensor, weight: Tensor, corner: Corner | Sequence[Corner]) -> tuple[Tensor, tuple[Corner, ...]]:
    corners: tuple[Corner, ...] = (corner,) if isinstance(corner, str) else tuple(corner)
    for name in corners:
        if name not in CORNERS:
            raise InputError(f"corner: got {name!r}, expected one of {', '.join(CORNERS)}")
    weight = weight if weight.dim() == 5 else weight[None]
    groups, channels, inputs, k, wide = weight.shape if weight.dim() == 5 else (0, 0, -1, 0, 0)
    if groups != len(corners) or channels != inputs or k != wide or not k:
        raise InputError(
            f"weight: got shape {tuple(weight.shape)}, expected ({len(corners)}, channels, channels, k, k) for {corners}"
        )
    if not y.is_floating_point():
        raise TypeError(f"y: got {y.dtype}, expected floating-point numbers")
    if y.dim() != 4 or y.shape[1] != groups * channels or not y.numel():
        raise InputError(f"y: got shape {tuple(y.shape)}, expected (batch, {groups * channels}, height, width)")
    if not torch.isfinite(weight).all():
        raise InputError("weight: holds NaN or infinite values, and has no inverse; go back to an earlier state")
    for kernel, name in zip(weight, corners, strict=True):
        own = to_top_left(kernel, name)[..., -1, -1].diagonal()
        if bool((own == 0).any()):
            number = int((own == 0).nonzero()[0, 0])
            raise InputError(
                f"weight: channel {number} has 0 on its own pixel, so that there is no inverse; check log_diagonal"
            )
    return weight, corners
