"""SparseGPT (Frantar and Alistarh, 2023): prune column by column, and let the kept weights make up for it."""

from __future__ import annotations

import torch
from torch import Tensor

from layerwright.core.treatment import Quantize, Sparsify
from layerwright.nn.stored import Stored
from layerwright.treat.prune._masks import removed_weights, smallest, two_of_four
from layerwright.treat.quantize._factor import Factor
from layerwright.treat.quantize._gptq import BLOCK, CLIP_GRID, Choice, sweep
from layerwright.treat.quantize._rtn import group_scales

__all__ = ["sparsegpt"]


@torch.no_grad()
def sparsegpt(
    weight: Tensor,
    factor: Factor,
    treatment: Sparsify,
    quantize: Quantize | None = None,
    scale_dtype: torch.dtype = torch.float32,
    *,
    removed: Tensor | None = None,
) -> Stored:
    """Prune `weight` ``(count, out, in)`` to the least squared error of its outputs, quantizing the rest on the way.

    The mask of a block of 128 columns (or of every four, for 2:4) is chosen when the block is reached, by
    ``w^2 / [U_jj]^2`` of the weights as they then are. Each block loses the same share, and each matrix exactly the
    promised number of weights. With `quantize` there are two passes: the first one shows how large the kept weights
    become, and the second one prunes and rounds together on scales that suit them.

    Args:
        weight: float ``(count, out, in)``.
        treatment: share and pattern.
        factor: from `layerwright.treat.quantize.prepare` with ``order="natural"``.
        quantize: how kept weights are rounded, if at all.
        scale_dtype: dtype that scales are rounded to.
        removed: ``(count,)`` numbers of zeros; None takes `treatment.sparsity` of each matrix.

    Returns:
        Dense with a mask, or codes with a mask (a removed weight has the zero point's code).
    """
    count, out, in_ = weight.shape
    weight = weight.float().masked_fill(factor.dead.unsqueeze(1), 0.0)
    if treatment.pattern == "2:4":
        choose: Choice = _two_of_four
        every = 4
    else:
        total = torch.full((count,), removed_weights(out, in_, treatment.sparsity)) if removed is None else removed
        choose, every = _share(total, in_), BLOCK
    pruned = sweep(weight, factor, None, choose, choose_every=every)
    if quantize is None:
        return Stored((count, out, in_), dense=pruned.values, mask=pruned.mask)
    # Kept weights grow to make up for the others, far beyond the ranges of the original ones.
    groups = (-1, in_ if quantize.group_size == -1 else quantize.group_size)
    grown, plain = (torch.unflatten(w, -1, groups) for w in (pruned.values, weight))
    ranged = torch.where((grown == 0).all(-1, keepdim=True), plain, grown).flatten(-2)
    scale, zero = group_scales(ranged, quantize, scale_dtype, clip=True, **CLIP_GRID)
    joint = sweep(weight, factor, (scale, zero, quantize.bits), choose, choose_every=every)
    return Stored((count, out, in_), codes=joint.values, scale=scale, zero=zero, mask=joint.mask, quantize=quantize)


def _two_of_four(values: Tensor, pivot: Tensor, first: int) -> Tensor:
    return two_of_four((values * pivot.unsqueeze(-1)).square().transpose(1, 2)).transpose(1, 2)


def _share(total: Tensor, in_: int) -> Choice:
    """Choose in every block its share of the `total` ``(count,)`` zeros."""

    def choose(values: Tensor, pivot: Tensor, first: int) -> Tensor:
        last = first + values.shape[1]
        scores = (values * pivot.unsqueeze(-1)).square().flatten(1)
        number = (total * last // in_ - total * first // in_).to(values.device)
        return ~smallest(scores, number).view(values.shape)

    return choose
