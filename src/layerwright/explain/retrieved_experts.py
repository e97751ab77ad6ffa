"""How evenly the experts of retrieval layers are used over data (He, 2024, PEER)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from layerwright.core.calibration import as_calibration, evaluating
from layerwright.core.errors import InputError
from layerwright.nn.peer import PEER
from layerwright.treat.swap_peer import find_peers

__all__ = ["RetrievedExperts", "retrieved_experts"]


@dataclass(frozen=True)
class RetrievedExperts:
    """Use of the experts of one layer.

    Attributes:
        counts: how often each expert was retrieved, int64 ``(experts,)``.
        weight: sum of its gates ``z`` over tokens and heads, float64 ``(experts,)``.
        tokens: that were counted.
    """

    counts: Tensor
    weight: Tensor
    tokens: int

    @property
    def usage(self) -> float:
        """Share of the experts with a weight above 0."""
        return float((self.weight > 0).double().mean())

    @property
    def unevenness(self) -> float:
        """``log E + sum p log p`` with ``p = z / sum z``: nats from uniform use, 0 is even, ``log E`` is one expert."""
        p = self.weight / self.weight.sum()
        return math.log(len(p)) + float(torch.special.xlogy(p, p).sum())

    def __str__(self) -> str:
        even = f"unevenness {self.unevenness:.3f} nats"
        return f"{len(self.counts)} experts: {self.usage:.1%} used, {even}, {self.tokens} tokens"


@torch.no_grad()
def retrieved_experts(model: nn.Module, data: Any) -> dict[str, RetrievedExperts]:
    """Count which experts each `PEER` layer retrieves for the tokens of `data`, padding left out where masks are given.

    Args:
        model: with such layers, or one of them (its path is then ``""``); run in evaluation mode, and left in the mode
            it was in.
        data: a `Calibration` or a list of batches; for a layer alone, tensors ``(..., dim)``. Labels are not needed.

    Returns:
        By path, in the model's order.

    Raises:
        InputError: the model has no such layer.

    Source: He, 2024, Mixture of A Million Experts, arXiv 2407.04153 (expert usage and unevenness).
    """
    layers = find_peers(model)
    if not layers:
        raise InputError(f"{type(model).__name__} has no PEER layer: swap_peer puts them in")
    calibration = as_calibration(data)
    counts = {path: torch.zeros(layer.num_experts, dtype=torch.int64) for path, layer in layers.items()}
    weights = {path: torch.zeros(layer.num_experts, dtype=torch.float64) for path, layer in layers.items()}
    tokens = dict.fromkeys(layers, 0)

    def counting(path: str, layer: PEER) -> Callable[..., None]:
        def hook(_router: nn.Module, given: tuple[Any, ...], found: tuple[Tensor, Tensor]) -> None:
            gates, indices = found
            real = given[1] if len(given) > 1 else None
            if real is not None:
                gates, indices = gates[real.bool()], indices[real.bool()]
            flat = indices.flatten().cpu()
            counts[path] += torch.bincount(flat, minlength=layer.num_experts)
            weights[path].index_add_(0, flat, gates.flatten().double().cpu())
            tokens[path] += flat.numel() // layer.active

        return hook

    hooks = [layer.router.register_forward_hook(counting(path, layer)) for path, layer in layers.items()]
    try:
        with evaluating(model):
            for batch in calibration:
                calibration.forward(model, batch)
    finally:
        for handle in hooks:
            handle.remove()
    return {path: RetrievedExperts(counts[path], weights[path], tokens[path]) for path in layers}
