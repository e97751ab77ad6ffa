"""Token routing, slowly: one token at a time, everything computed, nothing gathered."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["dense_routed_llama", "least_similar", "packed_block"]


def least_similar(similarity: list[list[float]], real: list[bool], share: Fraction) -> list[list[bool]]:
    """Labels over all blocks by sorting: ``(blocks, tokens)``."""
    pairs = [(v, b, t) for b, row in enumerate(similarity) for t, v in enumerate(row) if real[t]]
    kept = max(1, math.ceil(share * len(pairs)))
    chosen = {(b, t) for _, b, t in sorted(pairs)[:kept]}
    return [[(b, t) in chosen for t in range(len(row))] for b, row in enumerate(similarity)]


def dense_routed_llama(
    model: Any, ids: Tensor, weights: list[Tensor], masks: list[Tensor] | None, scale: float, gap: float
) -> Tensor:
    """Logits of a Llama whose feed-forward parts are masked: every block written out, all tokens computed."""
    inner = model.model
    hidden = inner.embed_tokens(ids)
    positions = torch.arange(ids.shape[1])[None]
    rotary = inner.rotary_emb(hidden, positions)
    seen = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()[None, None]
    for number, block in enumerate(inner.layers):
        score = torch.sigmoid(hidden @ weights[number])
        mask = score > 0.5 if masks is None else masks[number]
        attended, _ = block.self_attn(
            hidden_states=block.input_layernorm(hidden), position_embeddings=rotary, attention_mask=seen
        )
        after = hidden + attended
        factor = 0.5 * scale + (score - 0.5) * gap
        hidden = after + (mask * factor)[..., None] * block.mlp(block.post_attention_layernorm(after))
    logits: Tensor = model.lm_head(inner.norm(hidden))
    return logits


def packed_block(block: Any, rotary: nn.Module, hidden: Tensor, kept: list[int], factor: Tensor) -> Tensor:
    """One sample ``(1, tokens, hidden)`` through one block, of which only the tokens `kept` are run, one query at a time."""
    result = hidden.clone()
    for place in kept:
        before = [other for other in kept if other <= place]
        rows = hidden[:, before]
        positions = torch.tensor(before)[None]
        size = len(before)
        attended, _ = block.self_attn(
            hidden_states=block.input_layernorm(rows),
            position_embeddings=rotary(rows, positions),
            attention_mask=torch.ones(size, size, dtype=torch.bool).tril()[None, None],
        )
        after = (rows + attended)[:, -1]
        result[:, place] = after + factor[place] * block.mlp(block.post_attention_layernorm(after[:, None]))[:, 0]
    return result
