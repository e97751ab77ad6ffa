"""Attention whose extra keys are windows of other rows of the batch (Tworkowski et al., 2023, Focused Transformer)."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from layerwright.core.errors import InputError, unknown_name
from layerwright.nn._llama_attention import grouped, turn

__all__ = ["Layout", "context_rows", "cross_batch_attention", "packed_contexts"]

Layout = Literal["previous", "packed"]


def packed_contexts(rows: int, pack: int, extra: int) -> Tensor:
    """How many windows each row of a packed batch sees, its own included: ``(rows,)``.

    Row `p` of a pack sees ``min(p step + 1, extra + 1)`` with ``step = ceil((extra + 1) / max(pack - 1, 1))``, and never
    more than there are rows up to it.

    Args:
        rows: rows of the batch, a multiple of `pack`.
        pack: consecutive rows that one document fills.
        extra: windows besides its own that a row may see.

    Raises:
        InputError: rows that packs do not divide, or a number outside its range.
    """
    if pack < 1 or rows < 1 or rows % pack:
        raise InputError(f"pack: got {pack} for {rows} rows, expected a divisor")
    if extra < 0:
        raise InputError(f"extra: got {extra}, expected 0 or more")
    step = -(-(extra + 1) // max(pack - 1, 1))
    places = torch.arange(rows)
    return torch.minimum((places % pack * step + 1).clamp(max=extra + 1), places + 1)


def context_rows(
    rows: int, num_contexts: int, layout: Layout = "previous", contexts_per_row: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Which rows' windows each query row sees besides its own, and which of these entries count.

    ``previous``: of ``2 B`` rows the first half are previous windows and see none; row ``B + i`` sees the previous windows
    ``i, i + 1, ..., i + num_contexts - 1`` modulo B, its own document's first. ``packed``: row `b` sees ``b - 1, b - 2,
    ...``, no later row ever.

    Returns:
        Indices and booleans ``(query rows, extra windows)``; for ``previous`` of the second half alone.

    Raises:
        InputError: more windows than documents, or numbers that do not fit the batch.
    """
    if layout not in get_args(Layout):
        raise unknown_name("layout", str(layout), get_args(Layout))
    if num_contexts < 1:
        raise InputError(f"num_contexts: got {num_contexts}, expected at least 1")
    if layout == "previous":
        if rows % 2:
            raise InputError(f"rows: got {rows}, expected previous windows and as many current ones")
        if num_contexts > rows // 2:
            raise InputError(
                f"num_contexts: got {num_contexts} for a batch of {rows // 2} documents; use a larger batch"
            )
        seen = (torch.arange(rows // 2)[:, None] + torch.arange(num_contexts)) % (rows // 2)
        return seen, torch.ones_like(seen, dtype=torch.bool)
    if num_contexts > rows:
        raise InputError(f"num_contexts: got {num_contexts} for a batch of {rows} rows; use a larger batch")
    back = torch.arange(rows)[:, None] - 1 - torch.arange(num_contexts - 1)
    counts = torch.full((rows,), num_contexts) if contexts_per_row is None else contexts_per_row.cpu()
    if counts.shape != (rows,) or bool((counts < 1).any()) or bool((counts > num_contexts).any()):
        raise InputError(f"contexts_per_row: expected {rows} numbers from 1 to {num_contexts}, the own window included")
    return back.clamp(min=0), (back >= 0) & (torch.arange(num_contexts - 1) < counts[:, None] - 1)


def cross_batch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_contexts: int,
    layout: Layout = "previous",
    contexts_per_row: Tensor | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    scale: float | Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Causal attention within a row, and to whole windows of other rows, in one softmax with gradients to all of them.

    Extra keys are not rotated, which is what they are at position 0. Costs ``num_contexts`` more windows of attention.

    Tworkowski et al., 2023, Focused Transformer, arXiv 2307.03170.

    Args:
        q: ``(rows, heads, tokens, head_dim)``, not rotated.
        k, v: ``(rows, key-value heads, tokens, head_dim)``, not rotated.
        num_contexts: ``previous``: windows that a current row sees besides its own, the positive included (`d` in the
            paper). ``packed``: windows that a row sees at most, its own included.
        layout: see `context_rows`.
        contexts_per_row: for ``packed``: windows of each row, its own included (see `packed_contexts`).
        rope: cosine and sine ``(1 or rows, window, head_dim)`` for the local keys and all queries; None for no positions.
        scale: of scores, ``1 / sqrt(head_dim)`` by default; a tensor for one of each head ``(heads,)``.
        dropout: of the weights.

    Returns:
        ``(rows, heads, tokens, head_dim)``.

    Raises:
        InputError: shapes that do not fit, tokens beyond the window, or see `context_rows`.
    """
    rows, heads, tokens, width = q.shape
    if k.shape != v.shape or k.shape[0] != rows or k.shape[2:] != q.shape[2:] or heads % k.shape[1]:
        raise InputError(f"k, v: got {tuple(k.shape)} and {tuple(v.shape)} for queries {tuple(q.shape)}")
    if rope is not None and rope[0].shape[-2] < tokens:
        raise InputError(f"tokens: got {tokens}, longer than the window of {rope[0].shape[-2]} positions")
    seen, valid = (part.to(q.device) for part in context_rows(rows, num_contexts, layout, contexts_per_row))
    if isinstance(scale, Tensor):
        q, scale = q * scale.to(q.dtype)[:, None, None], 1.0
    turned, local = q, k
    if rope is not None:
        cos, sin = (table[..., :tokens, :] for table in rope)
        turned, local = turn(q, cos, sin), turn(k, cos, sin)
    settings: dict[str, Any] = {"dropout_p": dropout, "scale": width**-0.5 if scale is None else scale}
    k, v, local = (grouped(part, heads) for part in (k, v, local))
    if layout == "packed":
        return _joined(turned, local, v, k, v, seen, valid, settings)
    half = rows // 2
    first = F.scaled_dot_product_attention(turned[:half], local[:half], v[:half], is_causal=True, **settings)
    second = _joined(turned[half:], local[half:], v[half:], k[:half], v[:half], seen, valid, settings)
    return torch.cat([first, second])


def _joined(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    others_k: Tensor,
    others_v: Tensor,
    seen: Tensor,
    valid: Tensor,
    settings: dict[str, Any],
) -> Tensor:
    """Local causal keys and the windows of `others` that each row sees, under one softmax."""
    tokens = q.shape[2]
    more_k, more_v = (x[seen].transpose(1, 2).flatten(2, 3) for x in (others_k, others_v))
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).tril()
    mask = torch.cat(
        [causal.expand(len(q), -1, -1), valid.repeat_interleave(tokens, 1)[:, None].expand(-1, tokens, -1)], -1
    )
    keys, values = torch.cat([k, more_k], 2), torch.cat([v, more_v], 2)
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask[:, None], **settings)
