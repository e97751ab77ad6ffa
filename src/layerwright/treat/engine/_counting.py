"""What operations allocate, counted below PyTorch's Python interface."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Allocations"]


class Allocations(TorchDispatchMode):
    """Context: counts operations, and results whose memory belongs to none of their inputs.

    Memory that an operation takes and gives back inside is not seen.

    Args:
        least: results of fewer bytes are not counted.

    Attributes:
        operations: how many ran, views among them.
        sizes: bytes of each counted result, in order.
    """

    def __init__(self, least: int = 1) -> None:
        super().__init__()
        self.least, self.operations = least, 0
        self.sizes: list[int] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run `func` and look at its results."""
        given = {_memory(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and _memory(tensor) not in given:
                size = tensor.numel() * tensor.element_size()
                if size >= self.least:
                    self.sizes.append(size)
        return result


def _memory(tensor: Tensor) -> int:
    if tensor.layout != torch.strided:
        return id(tensor)
    return tensor.untyped_storage().data_ptr()
