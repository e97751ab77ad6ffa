"""CHMNet: dense matches of two pictures by voting over places and scales."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from layerwright.core.errors import InputError
from layerwright.nn.correlation import correlation_6d, interpolate_4d, mutual_nn_filter
from layerwright.nn.hough_groups import HoughKind
from layerwright.nn.hough_matching import CHM4d, CHM6d

__all__ = ["CHMNet"]


class CHMNet(nn.Module):
    """Scores of all matches between the cells of two pictures.

    Maps of a backbone are resized to three scales, each goes through a convolution of its own, and all pairs of scales
    are compared. `CHM6d` lets matches of like scale and displacement vote for one another; a sigmoid, the best pair of
    scales, four axes twice as fine, `CHM4d`, a softplus, and the mutual nearest-neighbour filter follow. Positive scores
    are what filter and transfer rely on. Besides backbone and convolutions there are 277 weights (``psi``).

    Source: Min and Cho, "Convolutional Hough Matching Networks" (2021, arXiv 2103.16831). There: conv4 of a ResNet-101
    on 240 x 240 pixels (maps of 1024 x 15 x 15), Adam at 1e-3, the backbone at 1e-5, batches of 20. That backbone is
    kept in two copies, one for each picture; here one serves both. Where `center_pivot` goes is our reading of the
    extension (2021, arXiv 2109.05221): into both layers.

    Args:
        backbone: any module from pictures to maps ``(batch, feat_dim, height, width)``; its dtype is that of the rest.
        kind: of both kernels: ``psi``, ``iso`` or ``full``.
        feat_dim: channels of the backbone's maps.
        scales: areas; one alone makes a 4-D network.
        projected_dim: channels that are compared; ``feat_dim // 4`` if left out.
        projection_kernel: odd side of the convolution of each scale.
        kernel_size: side of both kernels, odd.
        center_pivot: both layers move in one picture at a time.
        generator: of the first values of all that is new.

    Raises:
        InputError: an even kernel, an unknown kind, or fewer than one channel or scale.
    """

    def __init__(
        self,
        backbone: nn.Module,
        kind: HoughKind = "psi",
        feat_dim: int = 1024,
        *,
        scales: Sequence[float] = (0.5, 1.0, 2.0),
        projected_dim: int | None = None,
        projection_kernel: int = 3,
        kernel_size: int = 5,
        center_pivot: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        width = feat_dim // 4 if projected_dim is None else projected_dim
        if min(feat_dim, width, len(scales)) < 1:
            raise InputError(
                f"feat_dim, projected_dim, scales: got {feat_dim}, {width} and {tuple(scales)}, expected at least one of each"
            )
        if projection_kernel < 1 or projection_kernel % 2 == 0:
            raise InputError(f"projection_kernel: got {projection_kernel}, expected an odd number")
        self.backbone, self.scales, self.feat_dim = backbone, tuple(scales), feat_dim
        self.convs = nn.ModuleList(
            nn.Conv2d(feat_dim, width, projection_kernel, padding=projection_kernel // 2, bias=False) for _ in scales
        )
        scale_kernel = 3 if len(scales) > 1 else 1
        self.chm6d = CHM6d(scale_kernel, kernel_size, kind, center_pivot, generator=generator)
        self.chm4d = CHM4d(kernel_size, kind, center_pivot, generator=generator)
        for conv in self.convs:
            if not conv.weight.is_meta:  # type: ignore[union-attr]
                nn.init.kaiming_uniform_(conv.weight, math.sqrt(5), generator=generator)  # type: ignore[arg-type]

    def learner_parameters(self) -> list[nn.Parameter]:
        """All parameters but those of the backbone, for a learning rate of their own."""
        return [parameter for name, parameter in self.named_parameters() if not name.startswith("backbone.")]

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Scores of the matches of two batches of pictures; see `match`."""
        scores: Tensor = self.match(self.backbone(source), self.backbone(target))
        return scores

    def match(self, source: Tensor, target: Tensor) -> Tensor:
        """Positive scores ``(batch, 2 h, 2 w, 2 h', 2 w')``.

        Args:
            source: maps ``(batch, feat_dim, h, w)``.
            target: maps ``(batch, feat_dim, h', w')``.

        Raises:
            InputError: other axes or channels, or batches that differ.
        """
        for name, maps in (("source", source), ("target", target)):
            if maps.dim() != 4 or maps.shape[1] != self.feat_dim:
                raise InputError(
                    f"{name}: got maps of shape {tuple(maps.shape)}, expected (batch, {self.feat_dim}, height, width)"
                )
        votes: Tensor = self.chm6d(correlation_6d(source, target, self.scales, list(self.convs))[:, None])
        best = votes.sigmoid()[:, 0].amax((1, 2))
        first, second = ([2 * side for side in maps.shape[2:]] for maps in (source, target))
        scores = self.chm4d(interpolate_4d(best, first, second)[:, None])[:, 0]
        return mutual_nn_filter(functional.softplus(scores))
