"""How much of the attention to extra windows falls on the right one (Tworkowski et al., 2023, Focused Transformer)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from layerwright.core.errors import InputError
from layerwright.treat.memory import find_memory

__all__ = ["positive_attention_mass"]


@torch.no_grad()
def positive_attention_mass(
    model: nn.Module, batch: Mapping[str, Tensor], num_contexts: int, queries: Tensor | None = None
) -> dict[str, float]:
    """``r_d``: mass on a document's own earlier window, as a share of that on all `num_contexts` windows, by layer.

    A model that does not tell them apart has ``1 / num_contexts``. A mean over heads and queries.

    Args:
        model: with memory layers.
        batch: ``input_ids`` ``(2 documents, tokens)``: previous windows, then current ones (see `CrossBatchLoader`).
        num_contexts: windows that each query sees, the positive included.
        queries: boolean ``(documents, tokens)``; None for all tokens of current windows.

    Raises:
        InputError: a model without memory layers, or more windows than documents.
    """
    handle = find_memory(model)
    if handle is None:
        raise InputError("model: has no memory layers; see treat.memory.add_memory")
    was = model.training
    model.eval()
    try:
        with handle.crossing(num_contexts, record=True) as calls:
            calls.shares.clear()
            model(input_ids=batch["input_ids"], use_cache=False)
            found = [calls.shares[layer] for layer in sorted(calls.shares)]
    finally:
        model.train(was)
    result = {}
    for path, shares in zip(handle.layers, found, strict=True):
        ratio = shares[..., 0] / shares.sum(-1).clamp(min=1e-12)
        kept = ratio if queries is None else ratio.transpose(1, 2)[queries.to(ratio.device)]
        result[path] = float(kept.mean())
    return result
