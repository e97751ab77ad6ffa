"""Take heads out of attention, and neurons out of feed-forward parts, by how much each is worth."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from layerwright.core.attention_heads import HEAD_COUNTS, TOTAL_SIZES, AttentionHeads, attention_heads
from layerwright.core.errors import InputError
from layerwright.core.layer import LayerRef
from layerwright.core.layers import list_layers
from layerwright.nn.pruned_heads import PrunedHeads
from layerwright.nn.resized import ResizedLinear
from layerwright.nn.slices import Part, slice_linear
from layerwright.treat.narrow import FeedForward, feed_forwards, keep_neurons_

__all__ = ["best_units", "encoder_widths", "prune_heads_", "prune_neurons_"]


def best_units(scores: Tensor, count: int, name: str = "count") -> Tensor:
    """Indices ``(count,)`` of the largest scores ``(units,)``, in their own order; of equal ones the first.

    Raises:
        InputError: `count` is below 1 or above the number of units; `name` says of what.
    """
    if isinstance(count, bool) or not 1 <= count <= len(scores):
        raise InputError(f"{name}: got {count}, expected 1 to the present {len(scores)}")
    return torch.sort(scores.float(), descending=True, stable=True).indices[:count].sort().values


@torch.no_grad()
def prune_heads_(model: nn.Module, part: AttentionHeads, kept: Tensor) -> AttentionHeads:
    """Remove all other heads of an attention, in place: rows of query, key and value, columns of the output.

    New layers take the place of the old ones, whose tensors are not written to. The module is told its new number of
    heads, and a saved model keeps it.

    Args:
        model: changed.
        part: one of `attention_heads`.
        kept: indices of the heads that stay, ascending.

    Returns:
        The part as it is now.

    Raises:
        InputError: no index, one that is not there, or indices that do not ascend.
    """
    indices = kept.tolist()
    if not indices or indices != sorted(set(indices)) or not 0 <= indices[0] <= indices[-1] < part.heads:
        raise InputError(f"heads: got {indices[:8]} for {part.owner}, expected ascending indices below {part.heads}")
    places = (kept[:, None] * part.head_size + torch.arange(part.head_size, device=kept.device)).flatten()
    for ref in (part.q, part.k, part.v):
        _resize_(model, ref, rows=places)
    _resize_(model, part.o, columns=places)
    owner = model.get_submodule(part.owner)
    sizes = {name: len(indices) for name in HEAD_COUNTS if isinstance(getattr(owner, name, None), int)}
    sizes |= {name: len(places) for name in TOTAL_SIZES if isinstance(getattr(owner, name, None), int)}
    PrunedHeads(sizes).attach_(owner).train(owner.training)
    after = {ref.path: ref for ref in list_layers(model)}
    q, k, v, o = (after[ref.path] for ref in (part.q, part.k, part.v, part.o))
    return AttentionHeads(q, k, v, o, part.head_size)


def prune_neurons_(model: nn.Module, part: FeedForward, kept: Tensor) -> FeedForward:
    """Remove all other neurons of a feed-forward part, in place; what is left is not fitted anew.

    Args:
        model: changed.
        part: one of `feed_forwards`.
        kept: indices of the neurons that stay, ascending.

    Raises:
        InputError: no index, one that is not there, or indices that do not ascend.
    """
    return keep_neurons_(model, part, kept)


def encoder_widths(model: nn.Module) -> tuple[dict[str, AttentionHeads], dict[str, FeedForward]]:
    """The attention and the feed-forward part of each block of `model` that has both in a form that can be pruned.

    Raises:
        TypeError: no block has.
    """
    refs = list_layers(model)
    heads = attention_heads(model, refs)
    places = {(part.o.stack, part.o.block): path for path, part in heads.items()}
    parts = {
        places[part.down.stack, part.down.block]: part
        for part in feed_forwards(model, refs).values()
        if (part.down.stack, part.down.block) in places
    }
    if not parts:
        raise TypeError(
            f"model: {type(model).__name__} has no block with separate query, key, value and output projections and a "
            "plain feed-forward part"
        )
    return {path: part for path, part in heads.items() if path in parts}, parts


def _resize_(model: nn.Module, ref: LayerRef, *, rows: Part = None, columns: Part = None) -> None:
    old = model.get_submodule(ref.path)
    weight, bias = slice_linear(old, rows, columns)
    trained = any(parameter.requires_grad for parameter in old.parameters())
    if bias is not None:
        bias = bias.detach().requires_grad_(trained)
    layer = ResizedLinear.from_weight(weight.detach().requires_grad_(trained), bias)
    owner, _, name = ref.path.rpartition(".")
    setattr(model.get_submodule(owner), name, layer.train(old.training))
