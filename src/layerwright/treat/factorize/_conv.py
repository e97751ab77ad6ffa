"""Convolutions into chains of smaller ones: SVD in three unfoldings with groups, and CP."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from layerwright.core.conv_factors import ConvShape, check_factor, stage_shapes
from layerwright.core.errors import InputError
from layerwright.core.treatment import FactorConv
from layerwright.nn.conv_settings import ConvSettings
from layerwright.nn.factorized import FactorizedConv
from layerwright.treat.factorize._conv_cp import SWEEPS, cp_factors
from layerwright.treat.factorize._svd import svd_factors

__all__ = ["composed_kernel", "conv_kernels", "factor_cost", "factorize_conv"]


@torch.no_grad()
def factorize_conv(
    conv: nn.Conv2d,
    method: Literal["svd", "cp"] = "svd",
    scheme: Literal[2, 4, 5] = 4,
    groups: int = 1,
    rank: int = 8,
    *,
    seed: int = 0,
    sweeps: int = SWEEPS,
    name: str = "layer",
) -> FactorizedConv:
    """A chain of smaller convolutions that stands for `conv`, with the best factors of its weight at that rank.

    Stride, padding and dilation go to the stages that have the axis; the bias stays on the last stage. Both factors of
    an SVD take half of each singular value, so that their scales are alike. See `FactorConv` for the schemes. Source:
    Yu and Bouganis (2023), Mixed-TD.

    Args:
        conv: ``nn.Conv2d`` with ``groups=1``; left untouched.
        method, scheme, groups, rank: what is decomposed and how far; the rank is that of each group.
        seed, sweeps: of CP's random columns, and how often its factors are fitted in turn at most.
        name: the layer's, for errors.

    Raises:
        InputError: a grouped or transposed convolution, groups that do not divide the channels, a rank out of range.
    """
    if not isinstance(conv, nn.Conv2d):
        raise InputError(f"{name}: got {type(conv).__name__}, expected nn.Conv2d")
    if conv.groups != 1:
        raise InputError(f"{name}: got a convolution of {conv.groups} groups, expected 1; leave this layer alone")
    kh, kw = conv.kernel_size
    try:
        factor = FactorConv(rank, method, scheme, groups, kh, kw)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    kernels = conv_kernels(conv.weight, factor, seed=seed, sweeps=sweeps, name=name)
    bias = None if conv.bias is None else conv.bias.detach()
    chain = FactorizedConv.from_kernels(kernels, factor, ConvSettings.of(conv), bias, conv.weight.dtype)
    return chain.train(conv.training)


def factor_cost(
    shape: tuple[int, int, int, int],
    out_size: tuple[int, int],
    method: Literal["svd", "cp"] = "svd",
    scheme: Literal[2, 4, 5] = 4,
    groups: int = 1,
    rank: int = 8,
    *,
    stride: tuple[int, int] = (1, 1),
    in_size: tuple[int, int] | None = None,
    name: str = "layer",
) -> tuple[int, int]:
    """``(weights, multiply-adds of one sample)`` of the chain that `factorize_conv` makes, without bias.

    Args:
        shape: of the weight ``(out, in, height, width)``.
        out_size: of the output map.
        method, scheme, groups, rank: see `factorize_conv`.
        stride: of the convolution.
        in_size: of the input map; None is ``out_size * stride``, as with padding that keeps sizes.

    Raises:
        InputError: what `factorize_conv` would refuse; names the layer.
    """
    out, in_, kh, kw = shape
    factor = FactorConv(rank, method, scheme, groups, kh, kw)
    check_factor(factor, out, in_, name)
    before = in_size or (out_size[0] * stride[0], out_size[1] * stride[1])
    chain = stage_shapes(factor, ConvShape(in_, out, (kh, kw), stride, before, out_size))
    return sum(stage.params for stage in chain), sum(stage.macs for stage in chain)


@torch.no_grad()
def conv_kernels(
    weight: Tensor, factor: FactorConv, *, seed: int = 0, sweeps: int = SWEEPS, name: str = "layer"
) -> list[Tensor]:
    """Weights ``(out, in / groups, height, width)`` float32 of every stage of `factor`, in order of execution.

    Args:
        weight: float ``(out, in, height, width)`` of a convolution with one group.
        factor: the decomposition.
        seed, sweeps: of CP.

    Raises:
        InputError: a kernel of another size, a weight that is not finite, or `check_factor` refuses; names the layer.
    """
    if weight.dim() != 4 or weight.shape[2:] != (factor.kernel_height, factor.kernel_width):
        raise InputError(
            f"{name}: got a weight {tuple(weight.shape)}, expected (out, in, {factor.kernel_height}, "
            f"{factor.kernel_width}) as the treatment says"
        )
    out, in_, kh, kw = weight.shape
    check_factor(factor, out, in_, name)
    if not bool(weight.isfinite().all()):
        raise InputError(f"{name}: its weight holds NaN or infinity; check the checkpoint")
    r, g = factor.inner, factor.groups
    if factor.method == "cp":
        a, b, u, v = cp_factors(weight, r, seed=seed, sweeps=sweeps)
        return [b.T[:, :, None, None], u.T[:, None, :, None], v.T[:, None, None, :], a[:, :, None, None]]
    if factor.scheme == 2:
        left, right = svd_factors(weight.permute(0, 2, 1, 3).reshape(1, out * kh, in_ * kw), r)
        last = left.view(out, kh, r).transpose(1, 2).unsqueeze(-1)
        return [right.view(r, in_, 1, kw), last]
    if factor.scheme == 4:
        unfolded = weight.reshape(out, g, -1).transpose(0, 1)
        left, right = svd_factors(unfolded, r)
        return [right.reshape(g * r, in_ // g, kh, kw), left.transpose(0, 1).reshape(out, g * r, 1, 1)]
    unfolded = weight.view(g, out // g, in_, kh, kw).permute(0, 2, 1, 3, 4).reshape(g, in_, -1)
    left, right = svd_factors(unfolded, r)
    last = right.view(g, r, out // g, kh, kw).transpose(1, 2).reshape(out, r, kh, kw)
    return [left.transpose(1, 2).reshape(g * r, in_, 1, 1), last]


@torch.no_grad()
def composed_kernel(kernels: list[Tensor], factor: FactorConv) -> Tensor:
    """The one kernel ``(out, in, height, width)`` float32 that the stages amount to."""
    parts = [kernel.float() for kernel in kernels]
    if factor.method == "cp":
        b, u, v, a = (part.flatten(1) for part in parts)
        return torch.einsum("fr,rc,ri,rj->fcij", a, b, u, v)
    first, last = parts
    if factor.scheme == 2:
        return torch.einsum("frix,rcyj->fcij", last, first)
    g, r = factor.groups, factor.inner
    if factor.scheme == 4:
        inner = first.view(g, r, *first.shape[1:])
        return torch.einsum("fgr,grcij->fgcij", last.view(-1, g, r), inner).flatten(1, 2)
    outer = last.view(g, -1, *last.shape[1:])
    return torch.einsum("gfrij,grc->gfcij", outer, first.view(g, r, -1)).flatten(0, 1)
