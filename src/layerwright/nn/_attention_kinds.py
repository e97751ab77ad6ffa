"""Kinds of attention as functions of queries, keys and values ``(batch, heads, tokens, features)``; all linear in values.

`keep` is ``(batch, tokens)``, True where a key is a token and no padding; None for all. A query without a key gives 0.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "elu_features",
    "feature_attention",
    "linformer_attention",
    "local_attention",
    "orthogonal_gaussian",
    "performer_features",
    "softmax_attention",
    "synthesizer_attention",
]

_CHUNK = 64


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, causal: bool) -> Tensor:
    """``softmax(q k^T / sqrt(head_dim)) v``."""
    if keep is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    seen = keep[:, None, None, :]
    if causal:
        seen = seen & torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    return _masked(q, k, v, seen)


def _masked(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Attention to what is `seen`; rows that see nothing see everything instead, and are set to 0."""
    some = seen.any(-1, keepdim=True)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen | ~some)
    return out * some.to(out.dtype)


def local_attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, causal: bool, window: int) -> Tensor:
    """Softmax over the `window` keys around a query, or with `causal` the `window` last ones, itself included.

    Tokens are cut into chunks as long as a query reaches; each chunk sees itself and its neighbours:
    ``O(tokens * window)`` in time and memory.
    """
    tokens = q.shape[-2]
    back, ahead = (window - 1, 0) if causal else (window // 2, window // 2)
    chunk = max(back, 1)
    if 3 * chunk >= tokens:
        gap = torch.arange(tokens, device=q.device)
        near = _near(gap[None, :] - gap[:, None], back, ahead)
        return _masked(q, k, v, near if keep is None else near & keep[:, None, None, :])
    pad = -tokens % chunk
    real = q.new_ones(q.shape[0], tokens, dtype=torch.bool) if keep is None else keep
    real = _neighbours(F.pad(real, (0, pad))[:, None, :, None], chunk)[..., 0]
    queries = F.pad(q, (0, 0, 0, pad)).unflatten(2, (-1, chunk))
    keys, values = (_neighbours(F.pad(x, (0, 0, 0, pad)), chunk) for x in (k, v))
    place = torch.arange(3 * chunk, device=q.device)
    near = _near(place[None, :] - chunk - place[:chunk, None], back, ahead)
    out = _masked(queries, keys, values, near & real[:, :, :, None, :])
    return out.flatten(2, 3)[:, :, :tokens]


def _near(offset: Tensor, back: int, ahead: int) -> Tensor:
    return (offset >= -back) & (offset <= ahead)


def _neighbours(x: Tensor, chunk: int) -> Tensor:
    """``(batch, heads, chunks * chunk, features)`` to each chunk with the one before and after it."""
    padded = F.pad(x, (0, 0, chunk, chunk)).unflatten(2, (-1, chunk))
    return torch.cat([padded[:, :, :-2], padded[:, :, 1:-1], padded[:, :, 2:]], 3)


def elu_features(x: Tensor) -> Tensor:
    """``elu(x) + 1`` in float32 (Katharopoulos et al., 2020, arXiv 2006.16236)."""
    return F.elu(x.float()) + 1


def orthogonal_gaussian(rows: int, dim: int, generator: torch.Generator | None = None) -> Tensor:
    """``(rows, dim)``: blocks of `dim` orthogonal rows, each as long as a Gaussian vector (Choromanski et al., 2021)."""
    blocks = -(-rows // dim)
    directions = torch.linalg.qr(torch.randn(blocks, dim, dim, generator=generator))[0].transpose(1, 2).flatten(0, 1)
    # The sign that a QR decomposition fixes is drawn again, so that directions are uniform.
    signs = torch.randint(2, (blocks * dim, 1), generator=generator) * 2.0 - 1
    lengths = torch.randn(blocks * dim, dim, generator=generator).norm(dim=1, keepdim=True)
    return (directions * signs * lengths)[:rows]


def performer_features(x: Tensor, projection: Tensor, keys: bool, keep: Tensor | None = None) -> Tensor:
    """``exp(W x' - |x'|^2 / 2) / sqrt(m)`` with ``x' = x / head_dim^(1/4)``, in float32, up to a factor that cancels.

    The largest exponent is subtracted: of each query, and of all keys of a head together.

    Args:
        x: ``(batch, heads, tokens, head_dim)``.
        projection: ``W``, ``(m, head_dim)``.
        keys: whether `x` are keys.
        keep: keys that count.
    """
    x = x.float() * x.shape[-1] ** -0.25
    exponent = x @ projection.float().T - x.square().sum(-1, keepdim=True) / 2
    if keys and keep is not None:
        exponent = exponent.masked_fill(~keep[:, None, :, None], -torch.inf)
    largest = exponent.amax((-2, -1) if keys else -1, keepdim=True).detach()
    # Keys that are all padding have -inf as their largest.
    return (exponent - largest.clamp_min(torch.finfo(torch.float32).min)).exp() / projection.shape[0] ** 0.5


def feature_attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, causal: bool) -> Tensor:
    """``q (k^T v) / (q sum k)`` for features of queries and keys that are not negative; ``O(tokens)``.

    Causal sums run over chunks: within a chunk the products of all pairs, before it a running state.
    """
    dtype, v = v.dtype, v.float()
    if keep is not None:
        k = k * keep[:, None, :, None]
    v = torch.cat([v, torch.ones_like(v[..., :1])], -1)  # the last column sums the weights
    out = _causal(q, k, v) if causal else q @ (k.transpose(-1, -2) @ v)
    return (out[..., :-1] / out[..., -1:].clamp_min(torch.finfo(torch.float32).tiny)).to(dtype)


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    tokens = q.shape[-2]
    q, k, v = (F.pad(x, (0, 0, 0, -tokens % _CHUNK)).unflatten(2, (-1, _CHUNK)) for x in (q, k, v))
    state = k.transpose(-1, -2) @ v
    before = state.cumsum(2) - state
    out = (q @ k.transpose(-1, -2)).tril() @ v + q @ before
    return out.flatten(2, 3)[:, :, :tokens]


def linformer_attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, key_rows: Tensor, rows: Tensor) -> Tensor:
    """Softmax over ``E k`` and ``F v``: projections ``(heads, rank, positions)`` of the sequence (Wang et al., 2020)."""
    if keep is not None:
        k, v = (x * keep[:, None, :, None].to(x.dtype) for x in (k, v))
    tokens = k.shape[-2]
    return F.scaled_dot_product_attention(q, key_rows[..., :tokens] @ k, rows[..., :tokens] @ v)


def synthesizer_attention(v: Tensor, keep: Tensor | None, scores: Tensor) -> Tensor:
    """Softmax of learned scores ``(heads, positions, positions)`` that look at no token (Tay et al., 2020, random)."""
    tokens = v.shape[-2]
    own = scores[:, :tokens, :tokens].float()[None]
    if keep is not None:
        own = own.masked_fill(~keep[:, None, None, :], torch.finfo(torch.float32).min)
    out = own.softmax(-1).to(v.dtype) @ v
    return out if keep is None else out * keep.any(-1)[:, None, None, None].to(out.dtype)
