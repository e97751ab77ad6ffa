"""The heads of a block's attention: which rows and columns of its layers belong to each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from layerwright.core.blocks import find_blocks
from layerwright.core.layer import LayerRef
from layerwright.core.layers import list_layers

__all__ = ["AttentionHeads", "attention_heads"]

HEAD_COUNTS = ("num_attention_heads", "num_heads", "n_heads")
HEAD_SIZES = ("attention_head_size", "head_dim", "head_size")
TOTAL_SIZES = ("all_head_size",)


@dataclass(frozen=True)
class AttentionHeads:
    """Self-attention with a query, key, value and output projection of its own.

    Attributes:
        q, k, v: their rows are the heads, one after the other.
        o: its columns are.
        head_size: features of a head.
    """

    q: LayerRef
    k: LayerRef
    v: LayerRef
    o: LayerRef
    head_size: int

    @property
    def heads(self) -> int:
        """Number of heads."""
        return self.o.shape[1] // self.head_size

    @property
    def owner(self) -> str:
        """Path of the module that holds the projections, which knows the number of heads."""
        return self.q.path.rpartition(".")[0]


def attention_heads(model: nn.Module, refs: Sequence[LayerRef] | None = None) -> dict[str, AttentionHeads]:
    """The attention of each block of `model` whose heads can be told apart, by the path of the block.

    Those are taken with exactly one query, key, value and output projection, plain linear layers of equal inner width
    (no shared keys), whose module says how wide a head is.

    Args:
        model: any model with blocks.
        refs: its layers, if listed already.
    """
    refs = list_layers(model) if refs is None else refs
    names = {(stack.path, i): name for stack in find_blocks(model) for i, name in enumerate(stack.names)}
    by_block: dict[tuple[str, int], list[LayerRef]] = {}
    for ref in refs:
        if ref.block is not None and ref.role in ("q", "k", "v", "o", "qkv"):
            by_block.setdefault((ref.stack, ref.block), []).append(ref)
    found: dict[str, AttentionHeads] = {}
    for place, inside in by_block.items():
        roles = {ref.role: ref for ref in inside}
        if len(inside) != 4 or set(roles) != {"q", "k", "v", "o"}:
            continue
        plain = all(ref.layout == "linear" and ref.count == 1 and not ref.tied for ref in inside)
        inner = roles["o"].shape[1]
        size = _head_size(model.get_submodule(roles["q"].path.rpartition(".")[0]), inner)
        if plain and size and inner % size == 0 and all(roles[r].shape[0] == inner for r in "qkv"):
            found[names[place]] = AttentionHeads(roles["q"], roles["k"], roles["v"], roles["o"], size)
    return found


def _head_size(owner: nn.Module, inner: int) -> int:
    """Features of a head as the attention module says, 0 if it does not."""
    sizes = [getattr(owner, name, None) for name in HEAD_SIZES]
    counts = [inner // n for name in HEAD_COUNTS if isinstance(n := getattr(owner, name, None), int) and n > 0]
    return next((size for size in [*sizes, *counts] if isinstance(size, int) and size > 0), 0)
