"""A store of keys and values of earlier text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from layerwright.core.errors import InputError
from layerwright.nn._llama_attention import grouped

__all__ = ["KVMemory"]


class KVMemory:
    """Keys, not rotated, and values of earlier text, row by row of a batch.

    Args:
        num_heads: key-value heads.
        head_dim: features of a head.
        dtype: in which they are kept.
        capacity: positions that are kept, the newest; None for all.

    Raises:
        InputError: a number below 1, or a dtype that is not floating.
    """

    def __init__(
        self, num_heads: int, head_dim: int, dtype: torch.dtype = torch.bfloat16, capacity: int | None = None
    ) -> None:
        for name, value in (("num_heads", num_heads), ("head_dim", head_dim), ("capacity", capacity)):
            if value is not None and value < 1:
                raise InputError(f"{name}: got {value}, expected at least 1")
        if not dtype.is_floating_point:
            raise InputError(f"dtype: got {dtype}, expected a floating one")
        self.num_heads, self.head_dim, self.dtype, self.capacity = num_heads, head_dim, dtype, capacity
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.mask: Tensor | None = None

    def __len__(self) -> int:
        return 0 if self.mask is None else self.mask.shape[1]

    def append(self, k: Tensor, v: Tensor, mask: Tensor | None = None) -> None:
        """Add positions, detached.

        Args:
            k, v: ``(batch, heads, positions, head_dim)``.
            mask: ``(batch, positions)``, 0 for padding; None for none.

        Raises:
            InputError: other heads, features or batch than those that are held, or a dtype that is not floating.
        """
        expected = (self.num_heads, self.head_dim)
        if k.dim() != 4 or k.shape != v.shape or (k.shape[1], k.shape[3]) != expected:
            raise InputError(
                f"k, v: got {tuple(k.shape)} and {tuple(v.shape)}, expected {expected[0]} heads of {expected[1]}"
            )
        if not k.is_floating_point() or k.dtype != v.dtype:
            raise InputError(f"k, v: got {k.dtype} and {v.dtype}, expected one floating dtype")
        if self.mask is not None and len(self.mask) != len(k):
            raise InputError(
                f"k, v: got {len(k)} rows, the memory holds {len(self.mask)}; reset() it for another batch"
            )
        seen = torch.ones(len(k), k.shape[2], dtype=torch.bool, device=k.device) if mask is None else mask.bool()
        if seen.shape != (len(k), k.shape[2]):
            raise InputError(f"mask: got {tuple(seen.shape)}, expected {(len(k), k.shape[2])}")
        new = (k.detach().to(self.dtype), v.detach().to(self.dtype))
        start = 0 if self.capacity is None else max(0, len(self) + k.shape[2] - self.capacity)
        if self.keys is None or self.values is None or self.mask is None:
            self.keys, self.values, self.mask = (*(x[:, :, start:].clone() for x in new), seen[:, start:])
        else:
            self.keys = torch.cat([self.keys, new[0]], 2)[:, :, start:]
            self.values = torch.cat([self.values, new[1]], 2)[:, :, start:]
            self.mask = torch.cat([self.mask, seen], 1)[:, start:]

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Forget what these rows of the batch hold; None forgets everything, the batch's size too.

        Raises:
            InputError: a row that the memory does not have.
        """
        if rows is None:
            self.keys = self.values = self.mask = None
            return
        held = 0 if self.mask is None else len(self.mask)
        wrong = [row for row in rows if not 0 <= row < held]
        if wrong:
            raise InputError(
                f"rows: got {wrong}, the memory holds rows 0 to {held - 1}"
                if held
                else f"rows: got {wrong}, the memory is empty"
            )
        if self.mask is not None:
            self.mask = self.mask.clone()
            self.mask[list(rows)] = False

    def scores(self, q: Tensor) -> Tensor:
        """``q . k`` in float32, minus infinity for padding: ``(batch, heads, queries, positions)``; exact.

        Args:
            q: ``(batch, heads, queries, head_dim)``; heads a multiple of the memory's.
        """
        if self.keys is None or self.mask is None:
            return q.new_zeros(*q.shape[:3], 0, dtype=torch.float32)
        if q.shape[0] != len(self.mask) or q.shape[1] % self.num_heads or q.shape[3] != self.head_dim:
            raise InputError(
                f"q: got {tuple(q.shape)}; the memory holds {len(self.mask)} rows, {self.num_heads} heads of {self.head_dim}"
            )
        scores = (q.unflatten(1, (self.num_heads, -1)) @ self.keys.to(q.dtype)[:, :, None].transpose(-1, -2)).flatten(
            1, 2
        )
        return scores.float().masked_fill(~self.mask[:, None, None], float("-inf"))

    def search(self, q: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
        """The `top_k` positions of largest ``q . k`` for each query and head, exact (all, where there are fewer).

        Returns:
            Scores ``(batch, heads, queries, top_k)`` in float32, and keys and values ``(..., top_k, head_dim)``.

        Raises:
            InputError: `top_k` below 1, an empty memory, or queries of another form.
        """
        if top_k < 1:
            raise InputError(f"top_k: got {top_k}, expected at least 1")
        if self.keys is None or self.values is None:
            raise InputError("search: the memory is empty; append() first")
        scores, places = self.scores(q).topk(min(top_k, len(self)), -1)
        index = places.flatten(2)[..., None].expand(-1, -1, -1, self.head_dim)
        keys, values = (
            grouped(x, q.shape[1]).gather(2, index).view(*places.shape, -1) for x in (self.keys, self.values)
        )
        return scores, keys, values

    def heads(self, first: int, last: int) -> KVMemory:
        """The key-value heads `first` to `last` (excluded), without a copy."""
        part = KVMemory(min(last, self.num_heads) - first, self.head_dim, self.dtype)
        if self.keys is not None and self.values is not None:
            part.keys, part.values, part.mask = self.keys[:, first:last], self.values[:, first:last], self.mask
        return part
