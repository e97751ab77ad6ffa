"""Treatments that store a weight in another form of the same shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from layerwright.core.errors import InputError
from layerwright.core.treatment._base import Treatment, check_width, known

__all__ = ["Quantize", "Sparsify"]


@known
@dataclass(frozen=True)
class Quantize(Treatment):
    """Store the weight as integers, and compute with integer activations where `act_bits` is set.

    Attributes:
        bits: weight bits, 2 to 8.
        group_size: weights that share a scale along the input dimension; -1 is one scale per output channel.
        symmetric: no zero point.
        method: `rtn` (round to nearest), `mse` (clip to the least squared error), `gptq` (Frantar et al., 2023).
        act_bits: None computes in floating point; 8 multiplies int8 activations with int8 weights (W8A8).
        act_mode: `dynamic` measures each token's range as it comes; `static` takes the calibration's range.
    """

    tag: ClassVar[str] = "quantize"
    rank: ClassVar[int] = 30
    bits: int = 4
    group_size: int = -1
    symmetric: bool = True
    method: Literal["rtn", "mse", "gptq"] = "gptq"
    act_bits: int | None = None
    act_mode: Literal["dynamic", "static"] = "dynamic"

    def __post_init__(self) -> None:
        check_width(self.bits)
        if self.group_size != -1 and self.group_size < 1:
            raise InputError(f"group_size: got {self.group_size}, expected a positive number, or -1 for per channel")
        if self.act_bits not in (None, 8):
            raise InputError(f"act_bits: got {self.act_bits}, expected 8 or none")
        if self.act_bits == 8 and (self.bits != 8 or self.group_size != -1 or not self.symmetric):
            raise InputError("act_bits: 8 needs bits: 8, group_size: -1 and symmetric: true (integer products)")

    def label(self) -> str:
        """A short name for tables and charts."""
        group = "" if self.group_size == -1 else f" g{self.group_size}"
        acts = f" a{self.act_bits}" if self.act_bits else ""
        return f"int{self.bits}{acts}{group}{'' if self.symmetric else ' asym'} {self.method}"


@known
@dataclass(frozen=True)
class Sparsify(Treatment):
    """Set a share of the weights to zero and store the others with a bit mask.

    Attributes:
        sparsity: share of zeros, 0 to 1 (exclusive); must be 0.5 for the pattern `2:4`.
        pattern: `unstructured`, or `2:4` (two of every four along the input dimension).
        method: `magnitude`, `wanda` (Sun et al., 2023) or `sparsegpt` (Frantar and Alistarh, 2023).
    """

    tag: ClassVar[str] = "sparsify"
    rank: ClassVar[int] = 20
    sparsity: float = 0.5
    pattern: Literal["unstructured", "2:4"] = "unstructured"
    method: Literal["magnitude", "wanda", "sparsegpt"] = "sparsegpt"

    def __post_init__(self) -> None:
        if not 0 < self.sparsity < 1:
            raise InputError(f"sparsity: got {self.sparsity}, expected a share between 0 and 1")
        if self.pattern == "2:4" and self.sparsity != 0.5:
            raise InputError(f"sparsity: got {self.sparsity}, the pattern 2:4 is always 0.5")

    def label(self) -> str:
        """A short name for tables and charts."""
        return f"2:4 {self.method}" if self.pattern == "2:4" else f"sparse {self.sparsity:.0%} {self.method}"
