"""Treatments that make a layer narrower."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from layerwright.core.errors import InputError
from layerwright.core.treatment._base import Treatment, known

__all__ = ["Narrow"]


@known
@dataclass(frozen=True)
class Narrow(Treatment):
    """Remove inner neurons of a feed-forward part: inputs of its last projection, and what computes them.

    Given to the last projection (role ``down``); the layers that feed it lose the rows of the removed neurons, whatever
    treatment they get themselves.

    Attributes:
        share: of the neurons that stay, above 0 and below 1; rounded to a multiple of `multiple`, at least one.
        method: which ones stay: ``activation``, those with the largest share in the output's energy on the calibration
            data; ``magnitude``, those with the largest weights.
        compensate: fit the remaining columns to the output of all of them (least squares), where inputs are known.
        multiple: number of neurons that stays is a multiple of it, so that groups of weights and kernels fit.
    """

    tag: ClassVar[str] = "narrow"
    rank: ClassVar[int] = 5
    share: float = 0.75
    method: Literal["activation", "magnitude"] = "activation"
    compensate: bool = True
    multiple: int = 8

    def __post_init__(self) -> None:
        if isinstance(self.share, bool) or not 0 < self.share < 1:
            raise InputError(f"share: got {self.share}, expected a share between 0 and 1")
        if isinstance(self.multiple, bool) or self.multiple < 1:
            raise InputError(f"multiple: got {self.multiple}, expected a whole number of at least 1")

    def kept(self, width: int) -> int:
        """How many of `width` neurons stay."""
        steps = max(round(self.share * width / self.multiple), 1)
        return min(steps * self.multiple, width)

    def label(self) -> str:
        """A short name for tables and charts."""
        return f"width {self.share:.0%}"
