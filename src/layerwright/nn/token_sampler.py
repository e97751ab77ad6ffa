"""Adaptive token sampling: which tokens of an attention layer go on, as many as an image needs."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from layerwright.core.errors import InputError

__all__ = ["inverse_transform_sample", "token_significance"]


def token_significance(
    attention: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    value_norm: Literal["concat", "per_head", "none"] = "concat",
    special: int = 1,
) -> Tensor:
    """What each token but the class token counts: class attention times the length of its value; ``(batch, tokens - 1)``.

    ``sum_h A[h, 0, j] |V_j|`` over ``j >= special``, divided by its sum. Source: Fayyaz et al., 2022, Adaptive Token Sampling For
    Efficient Vision Transformers, arXiv 2111.15667.

    Args:
        attention: ``(batch, heads, rows, tokens)`` after softmax; row 0 is that of the class token, others are not read.
        values: ``(batch, heads, tokens, head_dim)``.
        mask: ``(batch, tokens)``, true for tokens that are there; the others get 0.
        value_norm: ``concat`` takes the length over all heads together, as the authors' code does; ``per_head`` multiplies
            head by head, as their text does; ``none`` leaves the values out, to compare with.
        special: tokens in front that get no score, such as the class token.

    Returns:
        Scores of 0 and more in float32 or above; a row sums to 1, and to 0 where all its tokens are special.

    Raises:
        InputError: shapes that do not fit, an unknown norm.
    """
    if attention.dim() != 4 or values.dim() != 4 or attention.shape[:2] != values.shape[:2]:
        raise InputError(
            f"attention, values: got shapes {tuple(attention.shape)} and {tuple(values.shape)}, expected "
            "(batch, heads, rows, tokens) and (batch, heads, tokens, head_dim)"
        )
    if attention.shape[3] != values.shape[2] or not 0 <= special < attention.shape[3]:
        raise InputError(
            f"values: got {values.shape[2]} tokens for {attention.shape[3]} attended, expected as many, more than special = "
            f"{special}"
        )
    if value_norm not in ("concat", "per_head", "none"):
        raise InputError(f"value_norm: got {value_norm!r}, expected 'concat', 'per_head' or 'none'")
    wide = torch.promote_types(attention.dtype, torch.float32)
    seen, lengths = attention[:, :, 0, special:].to(wide), values[:, :, special:].to(wide).norm(dim=-1)
    if value_norm == "per_head":
        scores = (seen * lengths).sum(1)
    else:
        scores = seen.sum(1) * (lengths.norm(dim=1) if value_norm == "concat" else 1.0)
    if mask is not None:
        if mask.shape != (attention.shape[0], attention.shape[3]):
            raise InputError(
                f"mask: got shape {tuple(mask.shape)}, expected {(attention.shape[0], attention.shape[3])}"
            )
        scores = scores.masked_fill(~mask[:, special:].bool(), 0.0)
    return scores / scores.sum(1, keepdim=True).clamp_min(torch.finfo(wide).tiny)


def inverse_transform_sample(
    scores: Tensor,
    num_points: int,
    mode: Literal["fixed", "random", "official"] = "fixed",
    rule: Literal["inverse", "nearest"] = "inverse",
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Tokens drawn through the inverse of the scores' distribution, each once: few where the scores are peaked.

    With ``C_i`` the sum of the scores up to token `i`, each point `u` takes the first token with ``C_i >= u``. Tokens
    that several points take are kept once, and tokens of score 0 never. Source: Fayyaz et al., 2022, arXiv 2111.15667.

    Args:
        scores: ``(batch, tokens)``, 0 and more; they need not sum to 1.
        num_points: points `u`, so at most that many tokens are kept; at least 1.
        mode: ``fixed``: ``u = (2 k - 1) / (2 num_points)``. ``random``: uniform draws. ``official``: as the authors' code does,
            tokens are sorted by score, the sums stretched to run from 0 to 1, and the points run in equal steps from the least
            sum above 0 to 1, so that the token of the lowest score is dropped; `rule` is ``nearest`` there.
        rule: ``inverse``; or ``nearest``: the token whose sum is nearest to `u`, the later one of two.
        generator: for ``random``.

    Returns:
        Positions ``(batch, kept)`` in rising order, and a mask of the same shape, true for those that are meant: rows with
        fewer tokens than the fullest one end with positions that are not. A row of zeros keeps none.

    Raises:
        InputError: no matrix, no points, an unknown mode or rule, scores below 0 or not finite.
    """
    if scores.dim() != 2 or not scores.shape[1]:
        raise InputError(f"scores: got shape {tuple(scores.shape)}, expected (batch, tokens) with at least one token")
    if isinstance(num_points, bool) or num_points < 1:
        raise InputError(f"num_points: got {num_points}, expected at least 1")
    if mode not in ("fixed", "random", "official"):
        raise InputError(f"mode: got {mode!r}, expected 'fixed', 'random' or 'official'")
    if rule not in ("inverse", "nearest"):
        raise InputError(f"rule: got {rule!r}, expected 'inverse' or 'nearest'")
    wide = scores.detach().to(torch.promote_types(scores.dtype, torch.float32))
    if not bool((wide.isfinite() & (wide >= 0)).all()):
        raise InputError("scores: got values that are NaN, infinite or below 0, expected 0 and more")
    order = None
    if mode == "official":
        wide, order = wide.sort(1)
    sums = wide.cumsum(1)
    if mode == "official":
        sums = sums - sums[:, :1]
    # The last sum is divided by itself: rounding leaves no point above it.
    sums = (sums / sums[:, -1:].clamp_min(torch.finfo(wide.dtype).tiny)).contiguous()
    points = _points(sums, num_points, mode, generator)
    picks = _search(sums, points, nearest=rule == "nearest" or mode == "official")
    if order is not None:
        picks = order.gather(1, picks)
    kept = torch.zeros_like(wide, dtype=torch.bool).scatter_(1, picks, True) & (scores > 0)
    counts = kept.sum(1)
    most = int(counts.max()) if len(counts) else 0
    positions = (~kept).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
    return positions, torch.arange(most, device=scores.device) < counts[:, None]


def _points(sums: Tensor, count: int, mode: str, generator: torch.Generator | None) -> Tensor:
    """``(batch, count)`` in 0..1."""
    if mode == "random":
        drawn = torch.rand(len(sums), count, generator=generator, dtype=sums.dtype).to(sums.device)
        return 1 - drawn  # (0, 1]: no token is taken for nothing
    if mode == "fixed":
        steps = torch.arange(1, 2 * count, 2, device=sums.device, dtype=sums.dtype) / (2 * count)
        return steps.expand(len(sums), -1).contiguous()
    start = sums.masked_fill(sums <= 0, 1.0).amin(1, keepdim=True)
    steps = torch.linspace(0, 1, count, device=sums.device, dtype=sums.dtype)
    return start + (1 - start) * steps


def _search(sums: Tensor, points: Tensor, nearest: bool) -> Tensor:
    """Positions ``(batch, points)``; of tokens with equal sums the first, which is the one with a score."""
    later = torch.searchsorted(sums, points).clamp_max(sums.shape[1] - 1)
    if not nearest:
        return later
    value = sums.gather(1, (later - 1).clamp_min(0))
    earlier = torch.searchsorted(sums, value)
    closer = (points - value) < (sums.gather(1, later) - points)
    return torch.where(closer & (later > 0) & (value > 0), earlier, later)
