"""Cutting stored weights apart and putting them together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from layerwright.nn.stored import Stored

__all__ = ["join_counts", "merge_rows", "split_rows"]


def split_rows(stored: Stored, sizes: Sequence[int]) -> list[Stored]:
    """A weight without factors, cut along ``out``."""
    ends = torch.tensor([0, *sizes]).cumsum(0).tolist()
    return [_rows(stored, start, stop) for start, stop in pairwise(ends)]


def _rows(stored: Stored, start: int, stop: int) -> Stored:
    return _map([stored], lambda tensors: tensors[0][:, start:stop].contiguous())


def join_counts(parts: Sequence[Stored]) -> Stored:
    """Weights of equal form, one after the other along ``count``."""
    return parts[0] if len(parts) == 1 else _map(parts, torch.cat)


def merge_rows(stored: Stored, count: int) -> Stored:
    """``(count * n, out, in)`` seen as ``(count, n * out, in)``."""
    if stored.shape[0] == count:
        return stored
    return _map([stored], lambda tensors: tensors[0].reshape(count, -1, tensors[0].shape[-1]))


def _map(parts: Sequence[Stored], change: Callable[[list[Tensor]], Tensor]) -> Stored:
    """Change every tensor of `parts`, field by field."""
    first = parts[0]
    fields: dict[str, Tensor] = {}
    for name in ("dense", "codes", "scale", "zero", "mask"):
        tensors = [getattr(part, name) for part in parts]
        if tensors[0] is not None:
            fields[name] = change(tensors)
    if first.factors is not None:
        left, right = (_map([part.factors[i] for part in parts if part.factors], change) for i in range(2))
        shape = (left.shape[0], left.shape[1], right.shape[2])
        return dataclasses.replace(first, shape=shape, factors=(left, right))
    count, out, in_ = fields["dense" if first.dense is not None else "codes"].shape
    return dataclasses.replace(first, shape=(count, out, in_), **fields)  # type: ignore[arg-type]
