"""Factorised convolutions the slow way: kernels multiplied out by loops, devices searched by brute force."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from layerwright.core.conv_factors import ConvShape
from layerwright.score.dataflow import Factors, engine


def impulse_kernel(chain: nn.Module, in_channels: int, size: tuple[int, int]) -> Tensor:
    """The kernel ``(out, in, height, width)`` that a chain of stride 1 and padding ``(size - 1) / 2`` amounts to."""
    height, width = size
    images = torch.zeros(in_channels, in_channels, 2 * height - 1, 2 * width - 1, dtype=torch.float32)
    for channel in range(in_channels):
        images[channel, channel, height - 1, width - 1] = 1
    answers = chain(images)[:, :, height - 1 - height // 2 : height + height // 2][
        :, :, :, width - 1 - width // 2 : width + width // 2
    ]
    return answers.flip(2, 3).transpose(0, 1)


def best_throughput(shapes: list[ConvShape], dsp: int) -> int:
    """The smallest number of cycles of the slowest layer, over all divisors of all layers within `dsp` multipliers."""
    options = []
    for shape in shapes:
        counts = (
            shape.groups,
            shape.in_channels // shape.groups,
            shape.out_channels // shape.groups,
            shape.kernel[0] * shape.kernel[1],
        )
        divisors = [[d for d in range(1, n + 1) if n % d == 0] for n in counts]
        made = [engine(shape, Factors(*combination)) for combination in itertools.product(*divisors)]
        options.append({(e.dsp, e.cycles) for e in made})
    return min(
        max(cycles for _, cycles in combination)
        for combination in itertools.product(*options)
        if sum(used for used, _ in combination) <= dsp
    )
