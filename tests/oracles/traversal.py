"""A Llama whose blocks run twice on the prompt, written out, with keys and values kept in plain lists."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["naive_traversal"]


def naive_traversal(
    model: Any, ids: Tensor, gates: list[Any], steps: int
) -> tuple[Tensor, list[tuple[Tensor, Tensor]], Tensor]:
    """Prompt ``(1, tokens)`` read at once, then `steps` greedy tokens.

    Returns:
        Logits of the prompt; keys and values of each block after it; logits of the decoded tokens.
    """
    inner = model.model
    kept: list[tuple[Tensor, Tensor]] = []
    hidden = inner.embed_tokens(ids)
    for number, block in enumerate(inner.layers):
        once, keys, values = _block(inner, block, hidden, 0, None)
        twice, _, _ = _block(inner, block, once, 0, None)
        gate = gates[number](once)[..., None]
        hidden = (1 - gate) * once + gate * twice
        kept.append((keys, values))
    logits = model.lm_head(inner.norm(hidden))
    after, decoded, last = list(kept), [], logits[:, -1:]
    for step in range(steps):
        hidden = inner.embed_tokens(last.argmax(-1))
        for number, block in enumerate(inner.layers):
            hidden, keys, values = _block(inner, block, hidden, ids.shape[1] + step, after[number])
            after[number] = (keys, values)
        last = model.lm_head(inner.norm(hidden))
        decoded.append(last)
    return logits, kept, torch.cat(decoded, 1)


def _block(inner: Any, block: Any, hidden: Tensor, start: int, past: Any) -> tuple[Tensor, Tensor, Tensor]:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    attention, x = block.self_attn, block.input_layernorm(hidden)
    shape = (*x.shape[:-1], -1, attention.head_dim)
    queries, keys, values = (
        project(x).view(shape).transpose(1, 2) for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    cos, sin = inner.rotary_emb(hidden, torch.arange(start, start + x.shape[1])[None])
    queries, keys = apply_rotary_pos_emb(queries, keys, cos, sin)
    if past is not None:
        keys, values = torch.cat([past[0], keys], 2), torch.cat([past[1], values], 2)
    groups = queries.shape[1] // keys.shape[1]
    weights = queries @ keys.repeat_interleave(groups, 1).transpose(-1, -2) * attention.scaling
    place = torch.arange(start, start + x.shape[1])[:, None]
    weights = weights.masked_fill(torch.arange(keys.shape[2])[None] > place, -torch.inf).softmax(-1)
    mixed = (weights @ values.repeat_interleave(groups, 1)).transpose(1, 2).flatten(2)
    after = hidden + attention.o_proj(mixed)
    return after + block.mlp(block.post_attention_layernorm(after)), keys, values
