"""Attention over the cache: many queries of a prompt, or one query a row."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

__all__ = ["attend_one", "attend_one_half", "bias_of_lengths", "bias_of_starts", "prompt_attention"]


def prompt_attention(q: Tensor, keys: Tensor, values: Tensor, starts: Tensor | None, scale: float) -> Tensor:
    """Causal attention of the last ``P`` of ``T`` places; a key `j` counts for the query at `i` iff ``start <= j <= i``.

    No mask is built where the prompt begins at the first place and has no padding. The result of a padded place is
    that of attention to itself: nothing reads it.

    Args:
        q: ``(n, heads, P, head_dim)``.
        keys, values: ``(n, kv_heads, T, head_dim)``.
        starts: padded places on the left of each row ``(n,)``; None for none.
        scale: of scores.

    Returns:
        ``(n, P, heads * head_dim)``.
    """
    rows, heads, queries, head_dim = q.shape
    groups, total = heads // keys.shape[1], keys.shape[2]
    if groups > 1:  # grouped attention of PyTorch's CPU library is many times slower than a copy
        keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    causal = starts is None and total == queries
    mask = None if causal else _prompt_mask(queries, total, starts, q.device)
    y = scaled_dot_product_attention(q, keys, values, attn_mask=mask, is_causal=causal, scale=scale)
    return y.transpose(1, 2).reshape(rows, queries, heads * head_dim)


def _prompt_mask(queries: int, total: int, starts: Tensor | None, device: torch.device) -> Tensor:
    """True where a key counts: ``(P, T)``, or ``(n, 1, P, T)`` with padding."""
    own = torch.arange(total - queries, total, device=device)[:, None]
    place = torch.arange(total, device=device)
    seen = place <= own
    if starts is None:
        return seen
    return ((seen & (place >= starts[:, None, None])) | (place == own))[:, None]


def bias_of_starts(starts: Tensor, length: int, kv_heads: int, dtype: torch.dtype) -> Tensor:
    """0 where a key counts and minus infinity where it is padding, ``(n * kv_heads, 1, length)``."""
    hidden = torch.arange(length, device=starts.device) < starts[:, None]
    return _as_bias(hidden, kv_heads, dtype)


def bias_of_lengths(lengths: Tensor, length: int, kv_heads: int, dtype: torch.dtype) -> Tensor:
    """0 for the first ``lengths[row]`` keys and minus infinity for the others, ``(n * kv_heads, 1, length)``."""
    hidden = torch.arange(length, device=lengths.device) >= lengths[:, None]
    return _as_bias(hidden, kv_heads, dtype)


def _as_bias(hidden: Tensor, kv_heads: int, dtype: torch.dtype) -> Tensor:
    bias = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))
    return bias.repeat_interleave(kv_heads, 0)[:, None]


def attend_one(
    q: Tensor,
    keys_t: Tensor,
    values: Tensor,
    bias: Tensor | None,
    scale: float,
    scores: Tensor,
    out: Tensor,
) -> None:
    """One query of each head, in float32, without allocating: heads that share keys are the rows of one product.

    Args:
        q: ``(n * kv_heads, groups, head_dim)``.
        keys_t: ``(n * kv_heads, head_dim, T)``.
        values: ``(n * kv_heads, T, head_dim)``.
        bias: ``(n * kv_heads, 1, T)`` or None.
        scale: of scores.
        scores: room for ``(n * kv_heads, groups, T)``; the softmax replaces the scores, element by element.
        out: ``(n * kv_heads, groups, head_dim)``.
    """
    if bias is None:
        torch.baddbmm(scores, q, keys_t, beta=0, alpha=scale, out=scores)
    else:
        torch.baddbmm(bias, q, keys_t, alpha=scale, out=scores)
    torch.softmax(scores, -1, out=scores)
    torch.bmm(scores, values, out=out)


def attend_one_half(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scale: float, out: Tensor) -> None:
    """The same in half precision, whose sums the library's fused attention keeps in float32; its result is allocated.

    Args:
        q, out: ``(n, kv_heads, groups, head_dim)``.
        keys, values: ``(n, kv_heads, T, head_dim)``.
        bias: ``(n * kv_heads, 1, T)`` or None.
        scale: of scores.
    """
    mask = None if bias is None else bias.view(q.shape[0], q.shape[1], 1, -1)
    out.copy_(scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale))
