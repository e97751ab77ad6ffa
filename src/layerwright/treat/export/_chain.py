"""The one convolution that a chain of convolutions computes."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn

from layerwright.core.treatment import FactorConv
from layerwright.nn.conv_settings import ConvSettings
from layerwright.nn.factorized import FactorizedConv
from layerwright.nn.quantized import QuantConv
from layerwright.treat.factorize import composed_kernel

__all__ = ["chain_kernel", "chain_settings"]


def chain_settings(chain: FactorizedConv) -> ConvSettings:
    """Settings of the convolution that `chain` took the place of."""
    own = [_settings(stage) for stage in chain]
    first, last = own[0], own[-1]
    padding: tuple[int, ...] | str = next((s.padding for s in own if isinstance(s.padding, str)), "")
    if not padding:
        padding = tuple(sum(p) for p in zip(*(s.padding for s in own if not isinstance(s.padding, str)), strict=True))
    return ConvSettings(
        first.in_channels,
        last.out_channels,
        tuple(max(k) for k in zip(*(s.kernel_size for s in own), strict=True)),
        tuple(prod(k) for k in zip(*(s.stride for s in own), strict=True)),
        padding,
        tuple(max(k) for k in zip(*(s.dilation for s in own), strict=True)),
        padding_mode=next((s.padding_mode for s in own if s.padding_mode != "zeros"), "zeros"),
    )


@torch.no_grad()
def chain_kernel(chain: FactorizedConv) -> Tensor:
    """The one kernel ``(out, in, height, width)`` that the stages amount to."""
    weights = [_weight(stage) for stage in chain]
    return composed_kernel(weights, _factor(chain)).to(weights[0].dtype).contiguous()


def _factor(chain: FactorizedConv) -> FactorConv:
    """The treatment that `chain` came from, read off the sizes of its stages."""
    own = [_settings(stage) for stage in chain]
    height, width = chain_settings(chain).kernel_size
    rank = own[0].out_channels
    if len(own) == 4:
        return FactorConv(rank, "cp", kernel_height=height, kernel_width=width)
    first, last = own
    if prod(last.kernel_size) == 1:
        return FactorConv(rank // first.groups, "svd", 4, first.groups, height, width)
    if prod(first.kernel_size) == 1:
        return FactorConv(rank // last.groups, "svd", 5, last.groups, height, width)
    return FactorConv(rank, "svd", 2, 1, height, width)


def _settings(stage: nn.Module) -> ConvSettings:
    return stage.settings if isinstance(stage, QuantConv) else ConvSettings.of(stage)


def _weight(stage: nn.Module) -> Tensor:
    weight = stage.weight
    assert isinstance(weight, Tensor)
    return weight.detach()
