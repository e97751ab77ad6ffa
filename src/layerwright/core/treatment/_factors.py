"""Treatments that replace a weight by a product of smaller ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from layerwright.core.errors import InputError
from layerwright.core.treatment._base import Treatment, known

__all__ = ["FactorConv", "LowRank"]


@known
@dataclass(frozen=True)
class LowRank(Treatment):
    """Replace the weight by a product of two thin matrices.

    Attributes:
        inner: the rank, that is the inner dimension of the product; at least 1.
        method: `svd` (least squared weight error) or `activation` (least squared output error on the calibration).
    """

    tag: ClassVar[str] = "low_rank"
    rank: ClassVar[int] = 10
    inner: int = 8
    method: Literal["svd", "activation"] = "activation"

    def __post_init__(self) -> None:
        if self.inner < 1:
            raise InputError(f"inner: got {self.inner}, expected a rank of at least 1")

    def label(self) -> str:
        """A short name for tables and charts."""
        return f"rank {self.inner}"


@known
@dataclass(frozen=True)
class FactorConv(Treatment):
    """Replace a convolution by a chain of smaller ones (Yu and Bouganis, 2023, Mixed-TD).

    Attributes:
        inner: the rank, in each group; at least 1.
        method: `svd` of one unfolding, or `cp` (a sum of products of four vectors).
        scheme: unfolding of the SVD: 2 splits the kernel's columns from its rows; 4 puts the whole kernel first, over
            `groups` of inputs; 5 puts it last, over `groups` of outputs.
        groups: of inputs (scheme 4) or outputs (scheme 5) that are decomposed each by itself.
        kernel_height, kernel_width: of the layer; a weight that is seen as a matrix does not tell them.
    """

    tag: ClassVar[str] = "factor_conv"
    rank: ClassVar[int] = 10
    inner: int = 8
    method: Literal["svd", "cp"] = "svd"
    scheme: Literal[2, 4, 5] = 4
    groups: int = 1
    kernel_height: int = 3
    kernel_width: int = 3

    def __post_init__(self) -> None:
        for name in ("inner", "groups", "kernel_height", "kernel_width"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"{name}: got {value!r}, expected a whole number of at least 1")
        if self.method not in ("svd", "cp") or self.scheme not in (2, 4, 5):
            raise InputError(
                f"factor_conv: got method {self.method!r}, scheme {self.scheme!r}; expected svd or cp, and 2, 4 or 5"
            )
        if self.groups > 1 and (self.method == "cp" or self.scheme == 2):
            raise InputError(f"groups: got {self.groups}, only the schemes 4 and 5 of svd have groups")

    def label(self) -> str:
        """A short name for tables and charts."""
        groups = f" in {self.groups} groups" if self.groups > 1 else ""
        return f"cp rank {self.inner}" if self.method == "cp" else f"svd-{self.scheme} rank {self.inner}{groups}"
