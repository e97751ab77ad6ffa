"""Pictures as tokens of square patches, and back; convolutions that run on such tokens."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional

from layerwright.core.errors import InputError

__all__ = ["PatchConv", "from_patches", "grid_of", "to_patches"]

Grid = tuple[int, int]


def to_patches(images: Tensor, patch: int) -> Tensor:
    """Pixels of each patch: ``(batch, C, H, W)`` to ``(batch, H W / patch^2, C patch^2)``, patches row by row.

    Order of the features: channel, then row, then column in the patch, that is ``c patch^2 + row patch + column``. It is
    that of ``functional.unfold`` and of the weight of a patch embedding: ``embed.weight.flatten(1)`` for an
    ``nn.Conv2d`` with kernel and stride `patch` is the matrix of the linear layer on these tokens.

    Raises:
        InputError: not ``(batch, C, H, W)``, or a patch that does not divide the height and the width.
    """
    if images.dim() != 4:
        raise InputError(f"images: got shape {tuple(images.shape)}, expected (batch, channels, height, width)")
    height, width = images.shape[2:]
    if patch < 1 or height % patch or width % patch:
        raise InputError(
            f"patch: got {patch} for maps of {height} x {width}, expected a divisor of both; pad the maps or take a smaller patch"
        )
    return functional.pixel_unshuffle(images, patch).flatten(2).mT


def from_patches(tokens: Tensor, patch: int, grid: Grid | None = None) -> Tensor:
    """The picture ``(batch, C, rows patch, columns patch)`` of tokens ``(batch, rows columns, C patch^2)``.

    Undoes `to_patches`. Without `grid` ``(rows, columns)`` it is a square.

    Raises:
        InputError: no such number of tokens or features.
    """
    if tokens.dim() != 3 or patch < 1 or tokens.shape[2] % patch**2:
        raise InputError(
            f"tokens: got shape {tuple(tokens.shape)}, expected (batch, tokens, features) with a multiple of patch^2 = {patch**2} features"
        )
    return functional.pixel_shuffle(tokens.mT.unflatten(2, grid_of(tokens.shape[1], grid)), patch)


def grid_of(tokens: int, grid: Grid | None = None) -> Grid:
    """`grid` ``(rows, columns)`` if it has that many cells; the square of that many if it is left out.

    Raises:
        InputError: another number of cells, or no square.
    """
    if grid is None:
        side = math.isqrt(tokens)
        grid = (side, side)
    if grid[0] < 1 or grid[0] * grid[1] != tokens:
        raise InputError(
            f"grid: got {grid[0]} x {grid[1]} for {tokens} tokens, expected (rows, columns) with that product"
        )
    return grid


class PatchConv(nn.Module):
    """A convolution of the map whose patches are the tokens: what attention over the patches can be converted from.

    Args:
        conv: with stride 1, from ``(batch, C, H, W)`` to a map of the same height and width.
        patch: side of the patches in pixels.
    """

    def __init__(self, conv: nn.Conv2d, patch: int) -> None:
        super().__init__()
        self.conv, self.patch = conv, patch

    def forward(self, tokens: Tensor, grid: Grid | None = None) -> Tensor:
        """``(batch, tokens, C patch^2)`` to ``(batch, tokens, C' patch^2)``; a square without `grid`."""
        return to_patches(self.conv(from_patches(tokens, self.patch, grid)), self.patch)
