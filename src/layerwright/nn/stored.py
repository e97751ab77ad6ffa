"""A treated weight as tensors, before a module packs it: the one form between the mathematics and the layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from layerwright.core.treatment import Quantize

__all__ = ["Stored"]


@dataclass(frozen=True)
class Stored:
    """What treatments made of one weight of shape ``(count, out, in)``.

    Exactly one form holds: dense (`dense`), quantized (`codes` and `scale`), low rank (`factors`), or rows of mixed
    widths (`parts`); `mask` makes a dense or a quantized weight sparse.

    Attributes:
        shape: ``(count, out, in)``.
        dense: float ``(count, out, in)``; zeros where `mask` is False.
        codes: int8 ``(count, out, in)`` on the signed grid ``[-2**(bits-1), 2**(bits-1) - 1]``.
        scale: float ``(count, out, groups)``, already rounded to the dtype it will be stored in.
        zero: int8 ``(count, out, groups)`` on the same grid, None if symmetric. ``w = (codes - zero) * scale``.
        mask: bool ``(count, out, in)``, True where a weight is kept.
        factors: ``(left (count, out, rank), right (count, rank, in))``; ``w = left @ right``.
        quantize: how `codes` came about (bits, group size, activation bits).
        input_scale: static activation scale, float scalar tensor, None if activations are not static.
        parts: quantized matrices ``(1, rows, in)``, one for each width, whose rows together are those of the weight.
        place: int32 ``(out,)``, where each row of the weight stands in the parts, one after the other.
        act_bits: of the activations that rows of mixed widths are multiplied with.
    """

    shape: tuple[int, int, int]
    dense: Tensor | None = None
    codes: Tensor | None = None
    scale: Tensor | None = None
    zero: Tensor | None = None
    mask: Tensor | None = None
    factors: tuple[Stored, Stored] | None = None
    quantize: Quantize | None = None
    input_scale: Tensor | None = None
    parts: tuple[Stored, ...] | None = None
    place: Tensor | None = None
    act_bits: int | None = None

    def to_dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that is computed with, ``(count, out, in)``."""
        if self.factors is not None:
            left, right = (factor.to_dense(torch.float32) for factor in self.factors)
            return (left @ right).to(dtype)
        if self.parts is not None:
            assert self.place is not None
            return torch.cat([part.to_dense(dtype) for part in self.parts], 1).index_select(1, self.place)
        if self.dense is not None:
            return self.dense.to(dtype)
        assert self.codes is not None and self.scale is not None
        count, out, _ = self.shape
        grouped = self.codes.reshape(count, out, self.scale.shape[-1], -1).float()
        if self.zero is not None:
            grouped = grouped - self.zero.unsqueeze(-1).float()
        weight = (grouped * self.scale.unsqueeze(-1).float()).reshape(self.shape)
        return (weight if self.mask is None else weight * self.mask).to(dtype)
