"""Rows of different widths in one layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from layerwright.core.errors import InputError
from layerwright.core.row_ranges import rows_from_text, rows_to_text
from layerwright.core.treatment._base import Treatment, check_width, known
from layerwright.core.treatment._weights import Quantize

__all__ = ["MixRows"]


@known
@dataclass(frozen=True)
class MixRows(Treatment):
    """Store some output rows of a linear layer in more bits than the others (Zheng et al., 2024, MixLLM).

    Rows of 8 bits have no zero point, narrower ones have one.

    Attributes:
        bits: width of the rows that are not listed, 2 to 8.
        rows: width to the rows that get it, such as ``8: 0-3 17`` or ``8: 0-3; 6: 9``.
        group_size: weights that share a scale along the input dimension; -1 is one scale per row.
        method: `gptq` (with the range of each group chosen by its outputs) or `rtn` (round to nearest).
        clip: whether `gptq` may shrink the range of a group.
        act_bits: 8 rounds the input for each token and group of inputs as it comes, and multiplies integers; None
            computes in floating point.
    """

    tag: ClassVar[str] = "mix_rows"
    rank: ClassVar[int] = 30
    bits: int = 4
    rows: str = ""
    group_size: int = 128
    method: Literal["rtn", "gptq"] = "gptq"
    clip: bool = True
    act_bits: int | None = 8

    def __post_init__(self) -> None:
        found = rows_from_text(self.rows)
        for width in (self.bits, *found):
            check_width(width)
        if self.bits in found:
            raise InputError(f"rows: {self.bits} bits is the width of the rows that are not listed; leave them out")
        if self.group_size != -1 and self.group_size < 1:
            raise InputError(f"group_size: got {self.group_size}, expected a positive number, or -1 for per channel")
        if self.act_bits not in (None, 8):
            raise InputError(f"act_bits: got {self.act_bits}, expected 8 or none")
        object.__setattr__(self, "rows", rows_to_text(found))

    def widths(self, out: int) -> dict[int, tuple[int, ...]]:
        """Width to its rows, from the largest on; together each of `out` rows once.

        Raises:
            InputError: a row that the layer does not have.
        """
        found = dict(rows_from_text(self.rows))
        last = max((rows[-1] for rows in found.values()), default=-1)
        if last >= out:
            raise InputError(f"rows: row {last} is listed, and the layer has rows 0 to {out - 1}")
        listed = {row for rows in found.values() for row in rows}
        rest = tuple(row for row in range(out) if row not in listed)
        return dict(sorted({**found, **({self.bits: rest} if rest else {})}.items(), reverse=True))

    def part(self, bits: int) -> Quantize:
        """How the rows of that width are stored."""
        return Quantize(bits, self.group_size, symmetric=bits == 8, method=self.method)

    def label(self) -> str:
        """A short name for tables and charts."""
        more = "".join(f" {len(rows)} rows int{width}" for width, rows in rows_from_text(self.rows).items())
        group = "" if self.group_size == -1 else f" g{self.group_size}"
        return f"int{self.bits}{' a8' if self.act_bits else ''}{group}{' +' + more if more else ''} {self.method}"
