"""Keys and values of all tokens so far, in tensors that are allocated once (Li et al., 2021, EET)."""

from __future__ import annotations

import torch
from torch import Tensor

from layerwright.core.errors import InputError

__all__ = ["StaticKVCache"]


class StaticKVCache:
    """Room for `batch` sequences of `max_length` tokens in every layer, one tensor a layer, never reallocated.

    Two ways of filling it: in lockstep all rows share `length`, and `start` says how many places on the left of each
    row are padding; with `lengths` given to `advance_rows` each row has its own length (serving).

    Args:
        layers, batch, kv_heads, max_length, head_dim: its extents.
        dtype, device: of keys and values.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        kv_heads: int,
        max_length: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, value in (("layers", layers), ("batch", batch), ("max_length", max_length)):
            if value < 1:
                raise InputError(f"{name}: got {value}, expected at least 1")
        shape = (2, batch, kv_heads, max_length, head_dim)
        self.layers = tuple(torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers))
        self.batch, self.kv_heads, self.max_length, self.head_dim = batch, kv_heads, max_length, head_dim
        self.length = 0
        self.start = torch.zeros(batch, dtype=torch.long, device=device)

    @property
    def nbytes(self) -> int:
        """Memory that it holds, whatever is in it."""
        return sum(layer.nbytes for layer in self.layers)

    def keys(self, layer: int, rows: int, length: int | None = None) -> Tensor:
        """Keys of the first `rows` sequences as a view ``(rows, kv_heads, length, head_dim)``."""
        return self.layers[layer][0, :rows, :, : self.length if length is None else length]

    def values(self, layer: int, rows: int, length: int | None = None) -> Tensor:
        """Values, as `keys`."""
        return self.layers[layer][1, :rows, :, : self.length if length is None else length]

    def need(self, more: int, length: int | None = None) -> None:
        """Check that `more` tokens fit, before anything is written.

        Raises:
            InputError: they do not.
        """
        held = self.length if length is None else length
        if held + more > self.max_length:
            raise InputError(
                f"cache: {held} tokens and {more} more exceed max_length {self.max_length}; compile with a larger one"
            )

    def write(self, layer: int, first_row: int, position: int, keys: Tensor, values: Tensor) -> None:
        """Put keys and values ``(n, kv_heads, tokens, head_dim)`` into rows from `first_row`, from place `position` on."""
        rows, tokens = keys.shape[0], keys.shape[2]
        place = self.layers[layer][:, first_row : first_row + rows, :, position : position + tokens]
        place[0].copy_(keys)
        place[1].copy_(values)

    def reorder(self, index: Tensor, since: int = 0) -> None:
        """Let row `i` hold what row ``index[i]`` holds, in place.

        Only rows that change are copied, and only places from `since` on: rows of one beam search share their prompt.

        Args:
            index: whole numbers ``(n,)``, rows of the cache; rows from `n` on stay.
            since: places before it are known to be equal.
        """
        rows = torch.arange(len(index), device=index.device)
        changed = (index != rows).nonzero().flatten()
        if not len(changed):
            return
        source = index[changed]
        for layer in self.layers:
            held = layer[:, source, :, since : self.length]
            layer[:, changed, :, since : self.length] = held
        self.start[changed] = self.start[source]

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` places; the next token goes there.

        Raises:
            InputError: longer than what is held.
        """
        if not 0 <= length <= self.length:
            raise InputError(f"length: got {length}, expected 0 to {self.length}")
        self.length = length

    def move_row(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` places of row `source` to row `target`."""
        for layer in self.layers:
            layer[:, target, :, :length].copy_(layer[:, source, :, :length])

    def clear(self) -> None:
        """Forget everything; memory is kept."""
        self.length = 0
        self.start.zero_()
