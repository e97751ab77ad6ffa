"""How alike two sets of features of the same samples are, whatever their rotation and scale."""

from __future__ import annotations

import torch
from torch import Tensor

from layerwright.core.errors import InputError

__all__ = ["linear_cka"]


def linear_cka(first: Tensor, second: Tensor) -> float:
    """Linear centred kernel alignment of features ``(samples, features)``, in 0..1 (Kornblith et al., 2019, arXiv 1905.00414).

    ``||Y^T X||^2 / (||X^T X|| ||Y^T Y||)`` of centred features, through the smaller of the two Gram matrices; float64 sums.

    Raises:
        InputError: other numbers of samples, fewer than two, or features that do not vary.
    """
    if first.dim() != 2 or second.dim() != 2 or len(first) != len(second) or len(first) < 2:
        raise InputError(
            f"features: got shapes {tuple(first.shape)} and {tuple(second.shape)}, expected (samples, features) of the same two "
            "or more samples"
        )
    x, y = (features.double() - features.double().mean(0) for features in (first, second))
    if max(x.shape[1], y.shape[1]) > len(x):
        left, right = x @ x.mT, y @ y.mT
        cross, norms = (left * right).sum(), torch.linalg.norm(left) * torch.linalg.norm(right)
    else:
        cross = (y.mT @ x).square().sum()
        norms = torch.linalg.norm(x.mT @ x) * torch.linalg.norm(y.mT @ y)
    if not norms > 0:
        raise InputError("features: one of them does not vary over the samples")
    return float(cross / norms)
