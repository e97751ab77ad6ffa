"""How many heads attention over patches needs to be a convolution, and how wide they must be."""

from __future__ import annotations

import torch
from torch import Tensor

from layerwright.core.errors import InputError
from layerwright.nn.conv_as_attention import conv_to_attention, patch_conv_blocks, patch_radius

__all__ = [
    "conv_to_attention",
    "head_dims",
    "heads_necessary",
    "heads_sufficient",
    "patch_conv_blocks",
    "quadratic_codes",
    "span_residual",
]

Pair = tuple[int, int]


def heads_sufficient(kernel: int, patch: int, dilation: int = 1) -> int:
    """``(2 ceil(dilation (kernel - 1) / (2 patch)) + 1)^2`` heads are enough for any kernel of that size.

    9 for any odd kernel from 3 to ``2 patch + 1``; ``kernel^2`` for pixels as tokens. Source: Li et al., "Can Vision
    Transformers Perform Convolution?" (2021, arXiv 2111.01353).

    Raises:
        InputError: sizes below 1, or an even reach, for which the number depends on the anchor.
    """
    return (2 * patch_radius(kernel, patch, dilation) + 1) ** 2


def heads_necessary(weight: Tensor, patch: int, dilation: int = 1, groups: int = 1, anchor: Pair | None = None) -> int:
    """The dimension of the span of a convolution's matrices between patches: no attention does with fewer heads.

    Let a layer whose logits are continuous in the input equal the convolution for all inputs ``t X``. As `t` goes to 0
    its weights tend to constants, and the output over `t` to ``sum_h A_h X W_h``: each matrix of an interior patch is a
    combination of the ``W_h``, of which there must be as many as the matrices have dimensions. Since entries of a matrix
    depend on differences of pixels alone, it is at most ``(2 patch - 1)^2 C_in C_out``, besides the number of patches in
    reach; almost every kernel attains the smaller of the two where its reach fills all patches.

    Args:
        weight: ``(out channels, in channels / groups, height, width)``; numerical rank in float64.
        patch, dilation, groups, anchor: see `patch_conv_blocks`.
    """
    return int(torch.linalg.matrix_rank(_stacked(weight, patch, dilation, groups, anchor)))


def span_residual(weight: Tensor, patch: int, heads: int, dilation: int = 1, groups: int = 1) -> float:
    """The least relative error with which `heads` heads that ignore content can follow a convolution, for white noise.

    The matrices between patches, each as a row, have singular values ``s``; no `heads` matrices span more than the first
    ones, so that ``sqrt(sum_(i > heads) s_i^2 / sum_i s_i^2)`` is left (Eckart and Young, 1936), whatever the heads'
    width and wherever they look.

    Args:
        weight: ``(out channels, in channels / groups, height, width)``.
        heads: 0 or more.

    Raises:
        InputError: negative heads, or a weight that is all zero.
    """
    if heads < 0:
        raise InputError(f"heads: got {heads}, expected 0 or more")
    power = torch.linalg.svdvals(_stacked(weight, patch, dilation, groups, None)).square()
    if not power.any():
        raise InputError("weight: all zero, expected a convolution that does something")
    return float((power[heads:].sum() / power.sum()).sqrt())


def head_dims(kernel: int, patch: int, in_channels: int, out_channels: int, dilation: int = 1) -> dict[Pair, int]:
    """Width that the head of each offset needs: the rank of its matrix, for almost every kernel of that size.

    For ``p = (kernel - 1) / 2`` up to `patch` it is ``patch^2``, ``patch p`` beside and ``p^2`` at corners, times the
    smaller number of channels: ``(patch + 2 p)^2`` together. Measured on one random kernel from one channel to one.

    Raises:
        InputError: sizes below 1, or an even kernel.
    """
    if min(in_channels, out_channels) < 1:
        raise InputError(f"in_channels, out_channels: got {in_channels}, {out_channels}, expected at least 1")
    patch_radius(kernel, patch, dilation)
    random = torch.randn(1, 1, kernel, kernel, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    blocks = patch_conv_blocks(random, patch, dilation)
    return {
        offset: int(torch.linalg.matrix_rank(block)) * min(in_channels, out_channels)
        for offset, block in blocks.items()
    }


def quadratic_codes(grid: Pair, centre: Pair, sharpness: float) -> tuple[Tensor, Tensor]:
    """Queries and keys ``(patches, 4)`` of absolute positions whose products are ``-sharpness |s - t - centre|^2``.

    So a head needs no relative bias to look at the patch at a fixed offset: ``q_t = sharpness (-1, 2 c_t, -|c_t|^2)``
    with ``c_t = t + centre``, and ``k_s = (|s|^2, s, 1)``. The last features only keep the logits' scale; softmax does
    without them, with 3. Source: Cordonnier et al., "On the Relationship between Self-Attention and Convolutional
    Layers" (2020, arXiv 1911.03584).

    Args:
        grid: ``(rows, columns)`` of patches, row by row.
        centre: offset ``(rows, columns)`` that the head looks at.
        sharpness: above 0.
    """
    place = torch.cartesian_prod(*(torch.arange(size, dtype=torch.float64) for size in grid)).view(-1, 2)
    aim = place + torch.tensor(centre, dtype=torch.float64)
    ones = torch.ones(len(place), 1, dtype=torch.float64)
    queries = sharpness * torch.cat([-ones, 2 * aim, -aim.square().sum(1, keepdim=True)], 1)
    return queries, torch.cat([place.square().sum(1, keepdim=True), place, ones], 1)


def _stacked(weight: Tensor, patch: int, dilation: int, groups: int, anchor: Pair | None) -> Tensor:
    """All matrices between patches as rows, in float64."""
    blocks = patch_conv_blocks(weight.detach().double(), patch, dilation, groups, anchor)
    return torch.stack([block.flatten() for block in blocks.values()])
