"""A convolution as a chain of smaller ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from layerwright.core.conv_factors import Stage, stages
from layerwright.core.errors import InputError
from layerwright.core.treatment import FactorConv
from layerwright.nn.conv_settings import ConvSettings
from layerwright.nn.low_rank import _conv_settings, _conv_spec, _empty_conv
from layerwright.nn.treated import owned

__all__ = ["FactorizedConv", "stage_settings"]


class FactorizedConv(nn.Sequential):
    """Two to four convolutions in turn, without nonlinearities, that stand for one (see `FactorConv`).

    Only the last one has a bias. Each is an ``nn.Conv2d`` (trainable) or, treated again, a `QuantConv`. Source: Yu and
    Bouganis (2023), Mixed-TD.
    """

    @classmethod
    def from_kernels(
        cls,
        kernels: Sequence[Tensor],
        factor: FactorConv,
        settings: ConvSettings,
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> FactorizedConv:
        """The chain that `factor` makes of a convolution of those `settings`, with `bias` ``(out,)``.

        Args:
            kernels: weight of each stage ``(out, in / groups, height, width)``.
            factor, settings: what was decomposed, and of what.
            bias: of the convolution, None for none.
            dtype: of the new weights.
        """
        chain = stage_settings(factor, settings)
        modules = []
        for number, (kernel, own) in enumerate(zip(kernels, chain, strict=True)):
            last = number == len(chain) - 1
            with torch.device("meta"):
                module = own.module(bias is not None and last, dtype)
            shape = module.weight.shape
            assert isinstance(shape, torch.Size)
            module.weight = nn.Parameter(owned(kernel, dtype, shape))
            if bias is not None and last:
                module.bias = nn.Parameter(owned(bias, dtype, bias.shape))
            modules.append(module)
        return cls(*modules)

    @classmethod
    def empty(cls, spec: Mapping[str, Any]) -> FactorizedConv:
        """A chain of that form with uninitialised tensors."""
        return cls(*(_empty_conv(stage) for stage in spec["stages"]))

    def spec(self) -> dict[str, Any]:
        """Plain data from which `empty` builds the same form."""
        return {"type": "factorized_conv", "stages": [_conv_spec(stage) for stage in self]}

    @property
    def bias(self) -> Tensor | None:
        """The bias ``(out,)``."""
        bias: Tensor | None = self[-1].bias  # type: ignore[assignment]
        return bias

    @property
    def in_channels(self) -> int:
        """Channels of the input."""
        return _conv_settings(self[0]).in_channels

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        return _conv_settings(self[-1]).out_channels


def stage_settings(factor: FactorConv, settings: ConvSettings) -> tuple[ConvSettings, ...]:
    """Settings of every stage: kernel, stride, padding and dilation of an axis go to the stage that has this axis.

    Padding commutes with the stages before it, as these work on single places of that axis and have no bias.

    Raises:
        InputError: groups, or other than two dimensions.
    """
    if settings.groups != 1 or len(settings.kernel_size) != 2:
        raise InputError(
            f"factor_conv: got a convolution of {settings.groups} groups in {len(settings.kernel_size)} dimensions, "
            "expected nn.Conv2d with groups=1; leave this layer alone"
        )
    chain = stages(factor, settings.out_channels, settings.in_channels)
    return tuple(_stage(stage, settings) for stage in chain)


def _stage(stage: Stage, settings: ConvSettings) -> ConvSettings:
    def pick(values: Sequence[int], rest: int) -> tuple[int, ...]:
        return values[0] if stage.height else rest, values[1] if stage.width else rest

    padding = settings.padding if isinstance(settings.padding, str) else pick(settings.padding, 0)
    return dataclasses.replace(
        settings,
        in_channels=stage.in_channels,
        out_channels=stage.out_channels,
        groups=stage.groups,
        kernel_size=pick(settings.kernel_size, 1),
        stride=pick(settings.stride, 1),
        dilation=pick(settings.dilation, 1),
        padding=padding,
        padding_mode=settings.padding_mode if stage.height or stage.width else "zeros",
    )
