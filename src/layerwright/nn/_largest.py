"""The largest values of each row: ``topk`` by partition, which is faster than torch's on few CPU threads."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["largest"]

SHORTEST = 48
LONGEST = 256
"""Up to here numpy's partition sorts with vector instructions; longer rows are folded first."""
FOLD = 8
MOST_THREADS = 2
"""With more threads torch, which divides the rows among them, is the faster one."""


def largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of the last dimension, falling, and their places: as ``values.topk(count)``.

    Exact. On the CPU, with at most two threads and where no gradient is asked for, the count-th largest value is found
    by a partition, and all that reach it are the result; where others tie with it, ``topk`` does all of it. In rows of
    more than 256, the groups of eight with the largest maxima are looked through alone.

    Args:
        values: ``(..., n)``.
        count: from 1 to ``n``.
    """
    n = values.shape[-1]
    if not _suits(values, count):
        found = values.topk(count, dim=-1)
        return found.values, found.indices
    rows = values.reshape(-1, n)
    places = _places_in_long(rows, count) if n > LONGEST else _places(rows, count)
    if places is None:
        found = values.topk(count, dim=-1)
        return found.values, found.indices
    ordered, order = rows.gather(-1, places).sort(-1, descending=True)
    shape = (*values.shape[:-1], count)
    return ordered.view(shape), places.gather(-1, order).view(shape)


def _suits(values: Tensor, count: int) -> bool:
    if torch.compiler.is_compiling() or values.device.type != "cpu" or values.dtype != torch.float32:
        return False
    n = values.shape[-1]
    if n > LONGEST and (n % FOLD or FOLD * count > LONGEST or n // FOLD < count):
        return False
    alone = not (torch.is_grad_enabled() and values.requires_grad)
    return alone and count < n and n >= SHORTEST and values.numel() > 0 and torch.get_num_threads() <= MOST_THREADS


def _places(rows: Tensor, count: int) -> Tensor | None:
    """Places ``(rows, count)`` of the largest, in no order; None where others tie with the last one of a row."""
    n = rows.shape[1]
    array = rows.detach().contiguous().numpy()
    last = np.partition(array, n - count, axis=-1)[:, n - count, None]
    reached = np.flatnonzero(~(array < last))  # at least `count` in every row, NaN among them as in a partition
    if len(reached) != count * len(array):
        return None
    return torch.from_numpy(reached).view(-1, count) % n


def _places_in_long(rows: Tensor, count: int) -> Tensor | None:
    """The same by groups of values that are ``n / 8`` apart: the largest are in the groups with the largest maxima."""
    columns = rows.shape[1] // FOLD
    groups = rows.view(-1, FOLD, columns)
    chosen = _places(groups.amax(1), count)
    if chosen is None:
        return None
    inside = groups.gather(2, chosen[:, None].expand(-1, FOLD, -1)).flatten(1)
    found = _places(inside, count)
    return None if found is None else (found // count) * columns + chosen.gather(1, found % count)
