"""The best factors of a given rank, for the weight itself or for its outputs on the calibration data."""

from __future__ import annotations

import torch
from torch import Tensor

from layerwright.core.treatment import LowRank, Quantize
from layerwright.nn.stored import Stored
from layerwright.treat.quantize import Factor, gptq_with, prepare, round_to_nearest

__all__ = ["low_rank", "output_spectrum", "svd_factors"]

_PANEL = 1024


@torch.no_grad()
def output_spectrum(weight: Tensor, gram: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Principal directions of the outputs ``W X`` of `weight` ``(count, out, in)``, with ``X X^T`` = `gram`.

    The squared error of the best rank ``r`` is the sum of the energies beyond the ``r`` first, for every rank at once.
    Computed in float64 from ``W gram W^T`` (after a QR factorisation if ``out > in``), which needs no inverse and no
    square root of the gram. Time about ``10 * min(out, in)**3`` besides the products.

    Args:
        weight: float ``(count, out, in)``.
        gram: ``(count, in, in)``; None is the identity. A matrix whose gram is zero counts as the identity too.

    Returns:
        energies ``(count, k)`` falling and directions ``(count, out, k)``, float64, ``k = min(out, in)``.
    """
    matrix = weight.double()
    basis = None
    if weight.shape[1] > weight.shape[2]:
        basis, matrix = torch.linalg.qr(matrix)
    moments = _sandwich(matrix, gram)
    energy, directions = torch.linalg.eigh((moments + moments.transpose(1, 2)) / 2)
    energy, directions = energy.flip(-1).clamp(min=0), directions.flip(-1)
    return energy, directions if basis is None else basis @ directions


@torch.no_grad()
def svd_factors(weight: Tensor, inner: int, gram: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Factors ``(count, out, inner)`` and ``(count, inner, in)`` float32 that minimise ``||(W - L R) X||_F``.

    `R` is the projection of the weight on the `inner` first directions of its outputs; without `gram` this is the
    truncated singular value decomposition. Both factors get equal norms, direction by direction.
    """
    directions = output_spectrum(weight, gram)[1][..., :inner]
    right = directions.transpose(1, 2) @ weight.double()
    norm = right.norm(dim=-1)
    root = torch.where(norm > 0, norm, 1.0).sqrt()
    return (directions * root.unsqueeze(1)).float(), (right / root.unsqueeze(-1)).float()


@torch.no_grad()
def low_rank(
    weight: Tensor,
    treatment: LowRank,
    gram: Tensor | None = None,
    quantize: Quantize | None = None,
    scale_dtype: torch.dtype = torch.float32,
    *,
    factor: Factor | None = None,
) -> tuple[Stored, list[Factor]]:
    """`weight` ``(count, out, in)`` as two factors in its dtype, or quantized.

    Quantized, the right factor is rounded first (it reads the layer's input and takes `quantize` as it is), the left
    one is fitted again to what the right one became, and rounded per channel.

    Args:
        weight: float ``(count, out, in)``.
        treatment: rank and method.
        gram: ``(count, in, in)``; the method `activation` needs it.
        quantize: how the factors are rounded; None leaves them as they are.
        scale_dtype: dtype that scales are rounded to.
        factor: of the same gram; GPTQ needs both, and gives way to rounding to nearest without them.

    Returns:
        What is stored, and the factors that were used to round.
    """
    fitted = gram if treatment.method == "activation" else None
    left, right = svd_factors(weight, treatment.inner, fitted)
    count, out, in_ = weight.shape
    if quantize is None:
        parts = [Stored((count, *part.shape[1:]), dense=part.to(weight.dtype)) for part in (left, right)]
        return Stored((count, out, in_), factors=(parts[0], parts[1])), []
    per_channel = Quantize(quantize.bits, -1, quantize.symmetric, quantize.method)
    clip = quantize.method != "rtn"
    used = []
    compensate = quantize.method == "gptq" and gram is not None and factor is not None
    if compensate and factor is not None:
        right_stored = gptq_with(right, factor, quantize, scale_dtype)
        used.append(factor)
    else:
        right_stored = round_to_nearest(right, quantize, scale_dtype, clip=clip)
    rounded = right_stored.to_dense().double()
    left = _fit_left(weight, rounded, fitted, left)
    if compensate:
        used.append(prepare(_sandwich(rounded, gram).float(), 1))
        left_stored = gptq_with(left, used[-1], per_channel, scale_dtype)
    else:
        left_stored = round_to_nearest(left, per_channel, scale_dtype, clip=clip)
    return Stored((count, out, in_), factors=(left_stored, right_stored)), used


def _fit_left(weight: Tensor, right: Tensor, gram: Tensor | None, left: Tensor) -> Tensor:
    """The left factor that fits `right` best: ``W G R^T (R G R^T)^-1``; `left` where that is not to be had."""
    moments = _sandwich(right, gram)
    target = _sandwich(right, gram, weight.double())
    diagonal = moments.diagonal(dim1=-2, dim2=-1)
    diagonal += 1e-8 * diagonal.mean(-1, keepdim=True)
    lower, info = torch.linalg.cholesky_ex(moments)
    usable = (info == 0)[:, None, None]
    identity = torch.eye(right.shape[1], dtype=torch.float64, device=right.device)
    fitted = torch.cholesky_solve(target, torch.where(usable, lower, identity))
    return torch.where(usable, fitted.transpose(1, 2).float(), left)


def _sandwich(left: Tensor, gram: Tensor | None, right: Tensor | None = None) -> Tensor:
    """``left @ gram @ right^T`` in float64, `right` being `left` if not given; a panel of the gram at a time."""
    right = left if right is None else right
    if gram is None:
        return left @ right.transpose(1, 2)
    result = left.new_zeros(left.shape[0], left.shape[1], right.shape[1])
    for start in range(0, gram.shape[-1], _PANEL):
        panel = slice(start, start + _PANEL)
        result += (left @ gram[:, :, panel].double()) @ right[:, :, panel].transpose(1, 2)
    empty = (gram.diagonal(dim1=-2, dim2=-1) == 0).all(-1)
    if bool(empty.any()):
        result[empty] = (left @ right.transpose(1, 2))[empty]
    return result
