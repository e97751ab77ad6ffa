"""Pooling by a p-norm, between the sum and the maximum."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from layerwright.core.errors import InputError

__all__ = ["p_norm_pool"]


def p_norm_pool(x: Tensor, p: float, kernel_size: int, stride: int | None = None) -> Tensor:
    """``(sum |x|^p)^(1/p)`` over windows of a map ``(batch, channels, height, width)``.

    Sums for `p` = 1; comes near the maximum for large `p` (Springenberg et al., 2015, arXiv 1412.6806). Computed in
    logarithms, so that no power overflows.

    Raises:
        InputError: `p` below 1 or no window fits.
    """
    if not p >= 1:
        raise InputError(f"p: got {p}, expected at least 1")
    if x.dim() != 4 or min(x.shape[2:]) < kernel_size or kernel_size < 1:
        raise InputError(
            f"x: got shape {tuple(x.shape)}, expected a map of at least {max(kernel_size, 1)} positions a side"
        )
    stride = stride or kernel_size
    channels, height, width = x.shape[1:]
    tiny = 1e-30
    windows = functional.unfold(x.abs().clamp_min(tiny).log(), kernel_size, stride=stride).unflatten(1, (channels, -1))
    pooled = (windows * p).logsumexp(2).div(p).exp()
    return pooled.unflatten(2, ((height - kernel_size) // stride + 1, (width - kernel_size) // stride + 1))
