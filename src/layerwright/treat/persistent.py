"""Put persistent vectors in place of the feed-forward parts of a Llama (Sukhbaatar et al., 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from layerwright.core.class_swap import swapped
from layerwright.core.errors import InputError
from layerwright.core.layers import structure_copy
from layerwright.nn._llama_attention import require_llama_attention
from layerwright.nn.persistent_attention import PersistentAttention
from layerwright.treat._chosen_blocks import chosen_blocks

__all__ = ["find_persistent", "persistent_mass", "swap_ffn_for_persistent"]


def swap_ffn_for_persistent(
    model: nn.Module,
    layers: str | Sequence[str] | Sequence[int] = "all",
    num_vectors: int = 1024,
    *,
    seed: int = 0,
    copy: bool = True,
) -> tuple[nn.Module, tuple[str, ...]]:
    """A model whose chosen blocks attend to the context and `num_vectors` learned vectors, and have no feed-forward part.

    ``x + Attention(norm(x))`` is all that such a block computes (Sukhbaatar et al., 2019, arXiv 1907.01470). Keys and
    values belong to key-value heads: ``2 num_vectors kv_heads head_dim`` numbers a block. What the feed-forward part
    knew is lost: the model is trained afterwards. Caches, padding and generation work as before.

    Args:
        model: a Llama of transformers, or one whose blocks are built alike.
        layers: ``all``, or paths or indices of blocks.
        num_vectors: vectors of each key-value head, at least 1.
        seed: of their first values.
        copy: leave `model` alone; the result shares the tensors that stay. False changes it.

    Returns:
        The model, and the paths of the changed blocks.

    Raises:
        InputError: no vector, an unknown block, or one that is changed already.
        TypeError: no blocks, or blocks that are built otherwise.
    """
    chosen = chosen_blocks(model, None if layers == "all" else layers)
    for path in chosen:
        _require_block(model.get_submodule(path), path)
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for path in chosen:
        attention: Any = model.get_submodule(f"{path}.self_attn")
        width = attention.head_dim
        made[path] = PersistentAttention(attention.k_proj.out_features // width, width, num_vectors, generator)
    result = structure_copy(model) if copy else model
    for path, memory in made.items():
        owner = result.get_submodule(path)
        like = next(p for p in owner.parameters() if p.is_floating_point())
        memory.to(device=like.device, dtype=like.dtype).attach_(owner).train(owner.training)
    return result, chosen


def find_persistent(model: nn.Module) -> dict[str, PersistentAttention]:
    """The vectors of each changed block of `model`, by the block's path."""
    ending = f".{PersistentAttention.child}"
    named = model.named_modules()
    return {path.removesuffix(ending): module for path, module in named if isinstance(module, PersistentAttention)}


@torch.no_grad()
def persistent_mass(model: nn.Module, input_ids: Tensor) -> dict[str, Tensor]:
    """Share of the softmax on persistent vectors, by block and head ``(heads,)``, a mean over tokens without padding.

    Args:
        model: changed by `swap_ffn_for_persistent`.
        input_ids: ``(batch, tokens)``.
    """
    shares: dict[str, Tensor] = {}
    handles = []
    for path, memory in find_persistent(model).items():

        def look(attention: Any, _: Any, kwargs: Any, path: str = path, memory: Any = memory) -> None:
            mass = memory.weights(attention, kwargs["hidden_states"], kwargs["position_embeddings"])
            shares[path] = mass.mean((0, 2))

        handles.append(model.get_submodule(f"{path}.self_attn").register_forward_pre_hook(look, with_kwargs=True))
    try:
        model(input_ids=input_ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return shares


def _require_block(block: nn.Module, path: str) -> None:
    if any(isinstance(child, PersistentAttention) for child in block.children()):
        raise InputError(f"layers: {path} has persistent vectors already; choose other blocks")
    attention = getattr(block, "self_attn", None)
    if not isinstance(attention, nn.Module):
        raise TypeError(f"layers: {path} has no self_attn; expected a block as Llama has it")
    require_llama_attention(attention, f"{path}.self_attn")
    if swapped(attention):
        raise InputError(f"layers: the attention of {path} was changed already; undo that first")
