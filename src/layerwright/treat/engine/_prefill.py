"""All tokens of a prompt at once: fills the cache, or encodes."""

from __future__ import annotations

import torch
from torch import Tensor

from layerwright.treat.engine._attention import prompt_attention
from layerwright.treat.engine._cache import StaticKVCache
from layerwright.treat.engine._products import Product
from layerwright.treat.engine._program import activation_into
from layerwright.treat.engine._weights import Block, Decoder

__all__ = ["head_logits", "hidden_states", "run_prompt"]


def run_prompt(
    decoder: Decoder,
    ids: Tensor,
    cache: StaticKVCache | None,
    *,
    first_row: int = 0,
    place: int = 0,
    starts: Tensor | None = None,
) -> Tensor:
    """Hidden states before the last norm, ``(n, P, hidden)``; keys and values enter the cache from `place` on.

    Intermediate results of one block live at a time, whatever the depth.

    Args:
        decoder: the weights.
        ids: ``(n, P)``.
        cache: None to keep nothing, which needs `place` 0.
        first_row: row of the cache that holds the first sequence.
        place: tokens of these rows that are in the cache already.
        starts: padded places on the left of each row ``(n,)``; None for none.
    """
    rows, tokens = ids.shape
    positions = torch.arange(place, place + tokens, device=ids.device).expand(rows, -1)
    if starts is not None:
        positions = (positions - starts[:, None]).clamp_(min=0)
    x = decoder.embedding[ids]
    if decoder.positions is not None:
        x = x + decoder.positions[positions]
    turns = None if decoder.turns is None else decoder.turns[positions if starts is not None else positions[:1]]
    for number, block in enumerate(decoder.blocks):
        x = _run_block(decoder, block, number, x, turns, cache, first_row, place, starts)
    return x


def _run_block(
    decoder: Decoder,
    block: Block,
    number: int,
    x: Tensor,
    turns: Tensor | None,
    cache: StaticKVCache | None,
    first_row: int,
    place: int,
    starts: Tensor | None,
) -> Tensor:
    shape = decoder.shape
    q, k, v = _heads(decoder, block, _rows_of(block.qkv, block.norm1(x)), turns)
    if cache is not None:
        cache.write(number, first_row, place, k, v)
        if place:
            rows = slice(first_row, first_row + len(x))
            k, v = cache.layers[number][:, rows, :, : place + x.shape[1]]
    attended = prompt_attention(q, k, v, starts, block.scale)
    del q, k, v
    x = x + _rows_of(block.out, attended)
    inner = _rows_of(block.up, block.norm2(x))
    if shape.gated:
        gate = inner[..., : block.width]
        activation_into(shape.activation, gate, gate)
        inner = gate * inner[..., block.width :]
    else:
        activation_into(shape.activation, inner, inner)
    return x + _rows_of(block.down, inner)


def _heads(decoder: Decoder, block: Block, qkv: Tensor, turns: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys, values ``(n, heads, P, head_dim)``, normalised and turned where the architecture does."""
    shape = decoder.shape
    heads = shape.heads + shape.kv_heads
    both, values = qkv.unflatten(-1, (-1, shape.head_dim)).split((heads, shape.kv_heads), -2)
    if turns is not None:
        wide = both.float()
        if block.qk_gain is not None:
            wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + shape.eps) * block.qk_gain
        pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))
        both = torch.view_as_real(pairs * turns[:, :, None]).flatten(-2).to(qkv.dtype)
    queries, keys = both.split((shape.heads, shape.kv_heads), -2)
    return queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)


def _rows_of(product: Product, x: Tensor) -> Tensor:
    """A product of ``(n, P, columns)``."""
    return product(x.reshape(-1, product.columns)).view(*x.shape[:-1], product.rows)


def hidden_states(decoder: Decoder, x: Tensor) -> Tensor:
    """The last norm, with its gain, for `x` ``(..., hidden)``."""
    return decoder.norm(x)


def head_logits(decoder: Decoder, x: Tensor) -> Tensor:
    """Logits ``(n, vocabulary)`` of hidden states `x` ``(n, hidden)`` before the last norm."""
    return decoder.head(decoder.norm(x))
