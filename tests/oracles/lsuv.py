"""LSUV by the book: for every layer in order of execution, whole passes until the variance of its output fits."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def lsuv_by_passes(layers: list[nn.Module], model: nn.Module, batch: Tensor, tol: float, tries: int) -> None:
    """`layers` in the order in which they run; their weights are orthonormal already, biases zero."""
    for layer in layers:
        for _ in range(tries):
            seen: list[Tensor] = []
            handle = layer.register_forward_hook(lambda _m, _a, output, seen=seen: seen.append(output))
            model(batch)
            handle.remove()
            variance = ((seen[0] - seen[0].mean()) ** 2).mean()
            if abs(variance - 1) < tol:
                break
            layer.weight.div_(variance.sqrt())
