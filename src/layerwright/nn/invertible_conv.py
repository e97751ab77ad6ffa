"""Convolutions of k x k whose inverse is cheap and whose determinant is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from layerwright.core.errors import InputError, LayerwrightError, unknown_name
from layerwright.nn._wavefront import (
    CORNERS,
    Corner,
    matrix_inverse,
    sequential_inverse,
    to_top_left,
    wavefront_inverse,
)

__all__ = ["FInCConv", "InverseMethod", "PaddedInvertibleConv2d", "ResidualError"]

InverseMethod = Literal["wavefront", "sequential", "matrix"]
METHODS: tuple[InverseMethod, ...] = ("wavefront", "sequential", "matrix")
Step = Callable[[int], None]


class ResidualError(LayerwrightError, ArithmeticError):
    """An inverse that does not bring back what it was given: the taps are too large for this precision."""


class PaddedInvertibleConv2d(nn.Module):
    """``y = W * pad(x)`` with zeros on two sides only, so that in raster order the whole map is a triangular matrix.

    One tap is constrained, the one on the pixel itself: it is unit lower triangular over the channels. All others are
    free. The determinant is 1, or ``exp(height width sum log_diagonal)`` with a learnt diagonal. The inverse takes
    ``height + width - 1`` steps; its rounding errors grow with the taps, since nothing bounds them (see `check`).

    Source: Kallappa et al., "FInC Flow: Fast and Invertible k x k Convolutions for Normalizing Flows" (2023, arXiv
    2301.09266). The learnt diagonal is an addition.

    Args:
        channels: of the map.
        kernel_size: k, at least 1.
        corner: where the zeros are: ``TL`` top and left, ``TR``, ``BL``, ``BR``.
        learn_diagonal: scale each channel by a positive number, 1 at first.
        generator: of the first weights, normal with standard deviation 0.05.

    Raises:
        InputError: a number below 1, or an unknown corner.
    """

    free: Tensor
    pivot: Tensor

    def __init__(
        self,
        channels: int,
        kernel_size: int = 3,
        corner: Corner = "TL",
        learn_diagonal: bool = False,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if channels < 1 or kernel_size < 1:
            raise InputError(f"channels, kernel_size: got {channels} and {kernel_size}, expected at least 1")
        if corner not in CORNERS:
            raise unknown_name("corner", str(corner), CORNERS)
        self.channels, self.kernel_size, self.corner = channels, kernel_size, corner
        self.weight = nn.Parameter(torch.empty(channels, channels, kernel_size, kernel_size))
        self.log_diagonal = nn.Parameter(torch.zeros(channels)) if learn_diagonal else None
        free, pivot = torch.ones(self.weight.shape), torch.zeros(self.weight.shape)
        free[..., -1, -1], pivot[..., -1, -1] = torch.tril(free[..., -1, -1], -1), torch.eye(channels)
        self.register_buffer("free", to_top_left(free, corner), persistent=False)
        self.register_buffer("pivot", to_top_left(pivot, corner), persistent=False)
        if not self.weight.is_meta:
            nn.init.normal_(self.weight, std=0.05, generator=generator)

    def effective_weight(self) -> Tensor:
        """The kernel that is applied: `weight` with the constrained entries put in their place, not trained."""
        pivot = self.pivot if self.log_diagonal is None else self.pivot * self.log_diagonal.exp().view(-1, 1, 1, 1)
        return self.weight * self.free + pivot

    def logdet(self, x: Tensor) -> Tensor:
        """Logarithms ``(batch,)`` of the absolute determinant of the Jacobian."""
        if self.log_diagonal is None:
            return x.new_zeros(x.shape[0])
        return (self.log_diagonal.sum() * x.shape[2] * x.shape[3]).to(x.dtype).expand(x.shape[0])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The map ``(batch, channels, height, width)`` and the logarithm ``(batch,)`` of the determinant.

        Raises:
            InputError: another number of axes or channels.
        """
        _check_map("x", x, self.channels)
        return self._convolve(x), self.logdet(x)

    def _convolve(self, x: Tensor) -> Tensor:
        more = self.kernel_size - 1
        left, top = more * (self.corner in ("TL", "BL")), more * (self.corner in ("TL", "TR"))
        padded = functional.pad(x, (left, more - left, top, more - top))
        return functional.conv2d(padded, self.effective_weight().to(x.dtype))

    def inverse(
        self,
        y: Tensor,
        method: InverseMethod = "wavefront",
        *,
        check: bool = False,
        tolerance: float = 1e-3,
        on_step: Step | None = None,
    ) -> Tensor:
        """The map whose image is `y`; differentiable with ``wavefront`` and ``matrix``.

        Args:
            y: ``(batch, channels, height, width)``.
            method: ``wavefront``; ``sequential`` goes pixel by pixel; ``matrix`` builds the whole matrix.
            check: apply the convolution to the result and compare.
            tolerance: largest difference allowed then, as a share of the largest value of `y`.
            on_step: called with the number of each step of ``wavefront`` and ``sequential``.

        Raises:
            InputError: shapes that do not fit, an unknown method, or weights that are not finite or have no inverse.
            ResidualError: the check failed; an ArithmeticError.
        """
        _check_map("y", y, self.channels)
        x = _invert(y, self.effective_weight()[None], (self.corner,), method, on_step)
        if check:
            _check_residual(self._convolve(x), y, tolerance)
        return x

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{self.channels}, kernel_size={self.kernel_size}, corner={self.corner!r}"


class FInCConv(nn.Module):
    """Four `PaddedInvertibleConv2d`, one for each corner, on a quarter of the channels each.

    Together they see every direction of the plane; their inverses do not depend on one another and are solved as one
    batch. Source: Kallappa et al. (2023, arXiv 2301.09266).

    Args:
        channels: of the map, a multiple of 4.
        kernel_size, learn_diagonal, generator: see `PaddedInvertibleConv2d`.

    Raises:
        InputError: channels that are no multiple of 4, or a kernel size below 1.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 3,
        learn_diagonal: bool = False,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if channels < 4 or channels % 4:
            raise InputError(f"channels: got {channels}, expected a multiple of 4, a quarter for each corner")
        self.channels, self.kernel_size = channels, kernel_size
        self.blocks = nn.ModuleList(
            PaddedInvertibleConv2d(channels // 4, kernel_size, corner, learn_diagonal, generator=generator)
            for corner in CORNERS
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The map ``(batch, channels, height, width)`` and the logarithm ``(batch,)`` of the determinant.

        Raises:
            InputError: another number of axes or channels.
        """
        _check_map("x", x, self.channels)
        parts = [block(part) for block, part in zip(self.blocks, x.chunk(4, 1), strict=True)]
        return torch.cat([part for part, _ in parts], 1), torch.stack([logdet for _, logdet in parts]).sum(0)

    def inverse(
        self,
        y: Tensor,
        method: InverseMethod = "wavefront",
        *,
        check: bool = False,
        tolerance: float = 1e-3,
        on_step: Step | None = None,
    ) -> Tensor:
        """The map whose image is `y`; see `PaddedInvertibleConv2d.inverse`. The four corners take their steps together."""
        _check_map("y", y, self.channels)
        weight = torch.stack([block.effective_weight() for block in self.blocks])  # type: ignore[operator]
        x = _invert(y, weight, CORNERS, method, on_step)
        if check:
            _check_residual(self(x)[0], y, tolerance)
        return x


def _invert(
    y: Tensor, weight: Tensor, corners: tuple[Corner, ...], method: InverseMethod, on_step: Step | None
) -> Tensor:
    if method == "wavefront":
        return wavefront_inverse(y, weight, corners, on_step)
    if method == "sequential":
        return sequential_inverse(y, weight, corners, on_step)
    if method == "matrix":
        return matrix_inverse(y, weight, corners)
    raise unknown_name("method", str(method), METHODS)


@torch.no_grad()
def _check_residual(again: Tensor, y: Tensor, tolerance: float) -> None:
    residual = float((again - y).abs().max() / y.abs().max().clamp_min(1e-30))
    if not residual <= tolerance:
        raise ResidualError(
            f"inverse: the result is off by {residual:.3g} of the largest value, allowed are {tolerance:g}; invert in "
            "float64, or keep the taps smaller"
        )


def _check_map(name: str, x: Tensor, channels: int) -> None:
    if x.dim() != 4 or x.shape[1] != channels:
        raise InputError(f"{name}: got shape {tuple(x.shape)}, expected (batch, {channels}, height, width)")
