"""How many bytes of activations a forward pass keeps for its backward pass."""

from __future__ import annotations

import itertools
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn

__all__ = ["SavedBytes"]


class SavedBytes:
    """Context: `bytes` counts what autograd saves while it is open; each storage once, the model's own tensors never.

    Args:
        model: whose parameters and buffers do not count.
    """

    def __init__(self, model: nn.Module) -> None:
        tensors = itertools.chain(model.parameters(), model.buffers())
        self._own = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        self._seen: set[int] = set()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self.bytes = 0

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # What is saved stays alive until the backward pass, so that an address stands for one storage.
        if storage.data_ptr() not in self._own and storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor

    def __enter__(self) -> Self:
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, error, traceback)
