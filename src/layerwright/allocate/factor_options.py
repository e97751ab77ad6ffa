"""Every factorisation of a convolution that is worth a look."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from layerwright.allocate.divisors import rich_ranks_between
from layerwright.core.conv_factors import ConvShape, largest_rank, stage_shapes
from layerwright.core.errors import InputError
from layerwright.core.treatment import FactorConv, Treatments

__all__ = ["RATIOS", "FactorOption", "enumerate_factorizations"]

RATIOS = (0.70, 0.65, 0.60, 0.55, 0.50, 0.45, 0.40, 0.35, 0.30)
"""Shares of a layer's multiplications that its candidates aim at."""


@dataclass(frozen=True)
class FactorOption:
    """One way to run a convolution.

    Attributes:
        treatments: what it gets; empty leaves it as it is.
        stages: sizes of the convolutions that then stand there.
    """

    treatments: Treatments
    stages: tuple[ConvShape, ...]

    @property
    def params(self) -> int:
        """Weights of all stages."""
        return sum(stage.params for stage in self.stages)

    @property
    def macs(self) -> int:
        """Multiply-adds of one sample."""
        return sum(stage.macs for stage in self.stages)

    @property
    def code(self) -> tuple[float, float, float, float]:
        """Four numbers for a predictor: method, scheme, groups, rank; CP has no scheme and groups; -1 for none."""
        factor = next((t for t in self.treatments if isinstance(t, FactorConv)), None)
        if factor is None:
            return -1.0, -1.0, -1.0, -1.0
        if factor.method == "cp":
            return 1.0, float(factor.inner), -1.0, -1.0
        return 0.0, float(factor.scheme), float(factor.groups), float(factor.inner)


def enumerate_factorizations(
    shape: ConvShape,
    ratios: Sequence[float] = RATIOS,
    methods: Iterable[str] = ("svd", "cp"),
    *,
    groups: Sequence[int] | None = None,
    name: str = "layer",
) -> tuple[FactorOption, ...]:
    """Candidates of one convolution, decomposition by decomposition with rising rank; as it is comes last.

    Each decomposition gets, for each of `ratios`, the rank whose multiplications are that share of the layer's, and
    between neighbouring ranks the one with the most divisors is taken. What multiplies more than the layer itself is
    left out. Source: Yu and Bouganis (2023), Mixed-TD.

    Args:
        shape: sizes of the convolution.
        ratios: of multiplications, above 0.
        methods: ``svd``, ``cp`` or both.
        groups: of the schemes 4 and 5, those that divide the channels; None is 1, and one for each channel.
        name: of the layer, for errors.

    Raises:
        InputError: a grouped convolution, a map without size, an unknown method or a ratio of 0; names the layer.
    """
    wanted = tuple(methods)
    if shape.groups != 1:
        raise InputError(f"{name}: got a convolution of {shape.groups} groups, expected 1; leave this layer alone")
    if min(*shape.in_size, *shape.out_size) < 1:
        raise InputError(f"{name}: its maps are {shape.in_size} and {shape.out_size}; costs need their sizes")
    if not set(wanted) <= {"svd", "cp"} or not ratios or min(ratios) <= 0:
        raise InputError(f"{name}: got methods {wanted} and ratios {tuple(ratios)}; expected svd or cp, ratios above 0")
    whole = FactorOption((), (shape,))
    found = []
    for start in _decompositions(shape, wanted, groups):
        most = largest_rank(start, shape.out_channels, shape.in_channels)
        per_rank = sum(stage.macs for stage in stage_shapes(start, shape))
        aims = [max(1, int(ratio * shape.macs / per_rank + 1e-9)) for ratio in ratios]
        for rank in rich_ranks_between(aims, most):
            factor = FactorConv(rank, start.method, start.scheme, start.groups, start.kernel_height, start.kernel_width)
            option = FactorOption((factor,), stage_shapes(factor, shape))
            if option.macs <= shape.macs:
                found.append(option)
    return (*found, whole)


def _decompositions(shape: ConvShape, methods: Sequence[str], groups: Sequence[int] | None) -> list[FactorConv]:
    """Every decomposition at rank 1."""
    kernel = shape.kernel
    found = []
    if "svd" in methods:
        found += [FactorConv(1, "svd", 2, 1, *kernel)] if kernel != (1, 1) else []
        inputs = (1, shape.in_channels) if groups is None else tuple(g for g in groups if shape.in_channels % g == 0)
        outputs = (1, shape.out_channels) if groups is None else tuple(g for g in groups if shape.out_channels % g == 0)
        found += [FactorConv(1, "svd", 4, g, *kernel) for g in dict.fromkeys(inputs)]
        found += [FactorConv(1, "svd", 5, g, *kernel) for g in dict.fromkeys(outputs)]
    if "cp" in methods and kernel != (1, 1):
        found.append(FactorConv(1, "cp", 4, 1, *kernel))
    return found
