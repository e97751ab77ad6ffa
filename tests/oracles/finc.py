"""Padded convolutions by their definition: one number at a time, in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def padded_convolution(x: Tensor, weight: Tensor, corner: str) -> Tensor:
    """``y[o, i, j] = sum W[o, c, u, v] x[c, ...]`` where the tap next to the unpadded corner sits on the pixel."""
    batch, _, height, width = x.shape
    k = weight.shape[-1]
    y = torch.zeros(batch, weight.shape[0], height, width, dtype=torch.float64)
    for i in range(height):
        for j in range(width):
            for u in range(k):
                for v in range(k):
                    row = i - (k - 1) + u if corner[0] == "T" else i + u
                    column = j - (k - 1) + v if corner[1] == "L" else j + v
                    if 0 <= row < height and 0 <= column < width:
                        y[:, :, i, j] += x[:, :, row, column].double() @ weight[:, :, u, v].double().T
    return y


def forward_substitution(y: Tensor, weight: Tensor) -> Tensor:
    """The inverse for the corner TL: pixel by pixel, channel by channel, with nothing but the definition."""
    _, channels, height, width = y.shape
    k = weight.shape[-1]
    x = torch.zeros_like(y, dtype=torch.float64)
    for i in range(height):
        for j in range(width):
            for o in range(channels):
                value = y[:, o, i, j].double()
                for u in range(k):
                    for v in range(k):
                        row, column = i - (k - 1) + u, j - (k - 1) + v
                        for c in range(channels):
                            itself = (row, column, c) == (i, j, o)
                            later = (row, column) == (i, j) and c > o
                            if row >= 0 and column >= 0 and not itself and not later:
                                value = value - weight[o, c, u, v].double() * x[:, c, row, column]
                x[:, o, i, j] = value / weight[o, o, k - 1, k - 1].double()
    return x


def jacobian_logdet(function: object, x: Tensor) -> float:
    """Logarithm of the absolute determinant of `function` at one flat point, by automatic differentiation."""
    jacobian = torch.autograd.functional.jacobian(function, x)  # type: ignore[no-untyped-call, arg-type]
    assert isinstance(jacobian, Tensor)
    return float(torch.linalg.slogdet(jacobian)[1])
