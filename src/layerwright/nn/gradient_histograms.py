"""Maps of gradient directions: features of pictures that need no training."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from layerwright.core.errors import InputError

__all__ = ["GradientHistograms"]


class GradientHistograms(nn.Module):
    """How strong the grey values change, direction by direction, around the cells of a grid; nothing is learnt.

    A gradient counts for a direction by the square of the cosine between them, if that is positive. Gradients are
    averaged over windows, divided by the strength of all of them there, and less their mean over the picture, so that
    cosines between cells tell them apart. Source: after Dalal and Triggs, "Histograms of Oriented Gradients for Human
    Detection" (2005). Cost: ``orientations`` products a pixel and as many averages for each window.

    Args:
        orientations: directions, evenly over the circle.
        stride: pixels of a cell; a picture of ``n`` pixels has ``round(n / stride)`` cells, the first and the last of
            them on its rims.
        windows: sides of the windows in cells; each gives `orientations` channels.

    Raises:
        InputError: a number below 1.
    """

    directions: Tensor

    def __init__(self, orientations: int = 8, stride: int = 8, windows: Sequence[float] = (1, 2)) -> None:
        super().__init__()
        if min(orientations, stride, *windows) <= 0 or not windows:
            raise InputError(
                f"orientations, stride, windows: got {orientations}, {stride}, {tuple(windows)}, expected positive numbers"
            )
        self.stride, self.windows = stride, tuple(windows)
        self.num_features = orientations * len(self.windows)
        angles = torch.arange(orientations) * (2 * math.pi / orientations)
        directions = torch.stack([angles.cos(), angles.sin()], 1)
        self.register_buffer("directions", directions[..., None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Pictures ``(batch, channels, height, width)`` to maps ``(batch, num_features, height', width')``.

        Raises:
            InputError: other axes, or a picture smaller than two cells.
        """
        if images.dim() != 4 or min(images.shape[2:]) < 2 * self.stride or not images.numel():
            raise InputError(
                f"images: got shape {tuple(images.shape)}, expected (batch, channels, height, width) of at least "
                f"{2 * self.stride} pixels a side"
            )
        grey = functional.pad(images.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
        slope = torch.cat([grey[..., 1:-1, 2:] - grey[..., 1:-1, :-2], grey[..., 2:, 1:-1] - grey[..., :-2, 1:-1]], 1)
        length = slope.square().sum(1, keepdim=True).add(1e-8).sqrt()
        along = functional.conv2d(slope, self.directions.to(slope.dtype)).clamp_min(0).square() / length
        cells = [round(side / self.stride) for side in images.shape[2:]]
        maps = torch.cat([self._averaged(along, round(window * self.stride), cells) for window in self.windows], 1)
        return maps - maps.mean((2, 3), keepdim=True)

    def _averaged(self, along: Tensor, window: int, cells: Sequence[int]) -> Tensor:
        window += 1 - window % 2
        half = window // 2
        mean = functional.avg_pool2d(along, (window, 1), 1, (half, 0), count_include_pad=False)
        mean = functional.avg_pool2d(mean, (1, window), 1, (0, half), count_include_pad=False)
        mean = functional.interpolate(mean, tuple(cells), mode="bilinear", align_corners=True)
        return mean / mean.square().sum(1, keepdim=True).add(1e-6).sqrt()
