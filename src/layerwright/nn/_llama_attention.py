"""The parts of an attention module as Llama has them: projections, rotary positions, groups of heads, masks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from layerwright.core.errors import InputError

__all__ = ["allowed", "grouped", "join_heads", "project", "require_llama_attention", "split_heads", "turn"]

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_OTHERS = ("q_norm", "k_norm", "sinks", "q_a_proj", "kv_a_proj_with_mqa")
"""Parts that attention has which computes something else."""


def require_llama_attention(module: nn.Module, path: str) -> None:
    """Refuse what does not compute attention as Llama does.

    Raises:
        TypeError: other projections, norms of queries, sliding windows, linear attention.
    """
    missing = [name for name in _PROJECTIONS if not isinstance(getattr(module, name, None), nn.Module)]
    more = [name for name in _OTHERS if getattr(module, name, None) is not None]
    if missing or more or not isinstance(getattr(module, "head_dim", None), int):
        what = f"without {', '.join(missing)}" if missing else f"with {', '.join(more)}" if more else "without head_dim"
        raise TypeError(f"{path}: {type(module).__name__} is attention {what}; attention as Llama has it is supported")
    config: Any = getattr(module, "config", None)
    window = module.sliding_window if hasattr(module, "sliding_window") else getattr(config, "sliding_window", None)
    if window or getattr(config, "attention_chunk_size", None):
        raise TypeError(f"{path}: attention within a sliding window is not supported")
    if getattr(module, "layer_idx", None) is None or getattr(module, "scaling", None) is None:
        raise TypeError(f"{path}: {type(module).__name__} has no layer_idx or scaling; expected attention as in Llama")


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """``(batch, tokens, heads * head_dim)`` to ``(batch, heads, tokens, head_dim)``."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """The inverse of `split_heads`."""
    return x.transpose(1, 2).flatten(2)


def project(attention: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values ``(batch, heads or key-value heads, tokens, head_dim)`` before they are rotated."""
    width = attention.head_dim
    q, k, v = (split_heads(layer(hidden), width) for layer in (attention.q_proj, attention.k_proj, attention.v_proj))
    return q, k, v


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions as Llama takes them: `x` ``(batch, heads, tokens, head_dim)``, tables ``(batch or 1, tokens, head_dim)``."""
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]


def grouped(x: Tensor, heads: int) -> Tensor:
    """Key-value heads, each repeated for its group: ``(batch, kv heads, ...)`` to ``(batch, heads, ...)``."""
    groups = heads // x.shape[1]
    return x if groups == 1 else x.repeat_interleave(groups, 1)


def allowed(mask: Tensor | None, tokens: int, keys: int, device: torch.device) -> Tensor:
    """Which keys each token sees, boolean and broadcast to ``(batch, heads, tokens, keys)``; causal where no mask is given.

    Raises:
        InputError: a mask that is not ``(batch, 1, tokens, keys)``.
    """
    if mask is None:
        places = torch.arange(keys, device=device)
        return (places <= places[keys - tokens :, None])[None, None]
    if mask.dim() != 4:
        raise InputError(
            f"attention_mask: got {mask.dim()} dimensions at the attention layer, expected 4; "
            "load the model with attn_implementation='sdpa' or 'eager'"
        )
    mask = mask[..., :keys]
    return mask if mask.dtype == torch.bool else mask >= 0
