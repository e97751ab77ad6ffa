"""Treatments that round what a layer reads, and what attention keeps of earlier tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from layerwright.core.errors import InputError
from layerwright.core.treatment._base import Treatment, check_width, known

__all__ = ["RoundActivations", "RoundAttention", "RoundCache"]


@known
@dataclass(frozen=True)
class RoundActivations(Treatment):
    """Round what a layer reads to a grid of few bits, with ranges from the calibration.

    Attributes:
        bits: 2 to 8.
        grid: `uniform`, or `two_region` for long tails such as the output of GELU (Tai et al., 2023).
        share: one scale per `tensor` or `channel` from the calibration, or per `token` as it comes.
        symmetric: no zero point.
        observer: how a range is chosen: `minmax`; `mse` (least squared error); `percentile` (the best of three, Li et
            al., 2023); `output` (least squared error of the layer's output); `hessian` (least second-order rise of the
            loss; Yuan et al., 2022); `power_of_two` (one step times 1, 2, 4 or 8 by channel; needs `share` channel and
            a uniform grid with a zero point; for what a norm reads; Lin et al., 2022).
    """

    tag: ClassVar[str] = "activations"
    rank: ClassVar[int] = 40
    bits: int = 8
    grid: Literal["uniform", "two_region"] = "uniform"
    share: Literal["tensor", "channel", "token"] = "tensor"
    symmetric: bool = False
    observer: Literal["minmax", "mse", "percentile", "output", "hessian", "power_of_two"] = "mse"

    def __post_init__(self) -> None:
        check_width(self.bits)
        if self.grid == "two_region" and (self.share != "tensor" or self.bits < 3):
            raise InputError("grid: two_region needs share: tensor and at least 3 bits (one says which region)")
        if self.observer == "power_of_two" and (self.share != "channel" or self.symmetric or self.grid != "uniform"):
            raise InputError("observer: power_of_two needs grid: uniform, share: channel and symmetric: false")

    def label(self) -> str:
        """A short name for tables and charts."""
        if self.observer == "power_of_two":
            return f"a{self.bits} power-of-two"
        return f"a{self.bits}{'' if self.grid == 'uniform' else ' two-region'}"


@known
@dataclass(frozen=True)
class RoundAttention(Treatment):
    """Round what the two products of an attention module read: query, key, probabilities, value.

    Attributes:
        bits: of all four, 2 to 8.
        probabilities: grid of the probabilities: `uniform`, `log2`, `log_sqrt2` (Li et al., 2023) or `two_region`.
        key_bits: of query and key, where other than `bits`.
        observer: see `RoundActivations`.
    """

    tag: ClassVar[str] = "attention"
    rank: ClassVar[int] = 40
    scope: ClassVar[Literal["weight", "block", "attention"]] = "attention"
    bits: int = 8
    probabilities: Literal["uniform", "log2", "log_sqrt2", "two_region"] = "uniform"
    key_bits: int | None = None
    observer: Literal["minmax", "mse", "percentile"] = "mse"

    def __post_init__(self) -> None:
        check_width(self.bits)
        if self.key_bits is not None:
            check_width(self.key_bits, "key_bits")
        if self.probabilities == "two_region" and self.bits < 3:
            raise InputError(f"bits: got {self.bits}, two regions need at least 3 (one bit says which region)")

    def label(self) -> str:
        """A short name for tables and charts."""
        key = "" if self.key_bits in (None, self.bits) else f"/{self.key_bits}"
        return f"attention a{self.bits}{key} {self.probabilities}"


@known
@dataclass(frozen=True)
class RoundCache(Treatment):
    """Round the keys and values that an attention module hands to its cache, with a scale for each token and head.

    The scales come with the tokens, so that nothing is stored and no calibration is needed (Liu et al., 2023, LLM-QAT;
    Yu et al., 2024, EDGE-LLM). Values are rounded where they enter the cache and kept in the model's own dtype.

    Attributes:
        bits: 2 to 8.
    """

    tag: ClassVar[str] = "cache"
    rank: ClassVar[int] = 40
    scope: ClassVar[Literal["weight", "block", "attention"]] = "attention"
    bits: int = 8

    def __post_init__(self) -> None:
        check_width(self.bits)

    def label(self) -> str:
        """A short name for tables and charts."""
        return f"cache int{self.bits}"
