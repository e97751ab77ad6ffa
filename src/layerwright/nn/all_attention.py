"""Attention to the context and to learned vectors in one softmax, in place of attention and feed-forward (2019)."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerwright.core.errors import InputError, unknown_name
from layerwright.nn.adaptive_span import AdaptiveSpan

__all__ = ["AllAttention", "PersistentMemory", "RelativePositions", "attend_to_vectors", "rotate", "skew", "unskew"]

Position = Literal["relative", "rope", "none"]
_BASE = 10_000.0


class PersistentMemory(nn.Module):
    """Keys and values that depend on no token: ``sqrt(head_dim) P_k`` and ``sqrt(num_vectors) P_v``.

    The stored tensors begin with variances ``1 / head_dim`` and ``1 / num_vectors``, so that what is used has unit
    variance and moves faster under an optimizer whose steps do not grow with the gradient.

    Args:
        num_heads: heads; they share no vector.
        head_dim: features of a head.
        num_vectors: vectors of each head; 0 for none.
        rescale: False stores unit variance and uses it as it is.
        generator: of the first values.

    Raises:
        InputError: a negative number of vectors.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        num_vectors: int,
        *,
        rescale: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if num_vectors < 0:
            raise InputError(f"num_vectors: got {num_vectors}, expected 0 or more")
        self.rescale = rescale
        self.factors = (math.sqrt(head_dim), math.sqrt(num_vectors)) if rescale and num_vectors else (1.0, 1.0)
        shape = (num_heads, num_vectors, head_dim)
        self.keys = nn.Parameter(torch.randn(shape, generator=generator) / self.factors[0])
        self.values = nn.Parameter(torch.randn(shape, generator=generator) / self.factors[1])

    def forward(self) -> tuple[Tensor, Tensor]:
        """Keys and values ``(heads, vectors, head_dim)`` as attention uses them."""
        return self.keys * self.factors[0], self.values * self.factors[1]

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"heads={self.keys.shape[0]}, vectors={self.keys.shape[1]}, rescale={self.rescale}"


class RelativePositions(nn.Module):
    """A vector for each distance, shared by all heads, and by all layers that are given the same one.

    Args:
        head_dim: features of a head.
        max_span: distances; the column of the nearest key is the last.
        generator: of the first values, of unit variance.
    """

    def __init__(self, head_dim: int, max_span: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(head_dim, max_span, generator=generator))

    def forward(self, queries: Tensor, length: int) -> Tensor:
        """What is added to the scores of the nearest `length` keys: ``(..., head_dim)`` to ``(..., length)``."""
        return queries @ self.weight[:, self.weight.shape[1] - length :]


def unskew(x: Tensor) -> Tensor:
    """``y[..., i, j] = x[..., i, i + j]``: ``(..., M, L + M - 1)`` by key to ``(..., M, L)`` by distance."""
    rows, width = x.shape[-2:]
    flat = F.pad(x.flatten(-2), (0, rows))
    return flat.unflatten(-1, (rows, width + 1))[..., : width - rows + 1]


def skew(x: Tensor) -> Tensor:
    """The inverse of `unskew`, with zeros where a query has no key: ``(..., M, L)`` to ``(..., M, L + M - 1)``."""
    rows, length = x.shape[-2:]
    flat = F.pad(x, (0, rows)).flatten(-2)
    return flat[..., : flat.shape[-1] - rows].unflatten(-1, (rows, length + rows - 1))


def attend_to_vectors(queries: Tensor, keys: Tensor, values: Tensor, weighting: Literal["softmax", "relu"]) -> Tensor:
    """``w(q K^T) V``: with ``relu`` a feed-forward part without biases, ``K`` its first matrix, ``V`` its second transposed.

    Args:
        queries: ``(..., tokens, features)``.
        keys, values: ``(..., vectors, features)``.
        weighting: what makes weights of the scores.
    """
    scores = queries @ keys.transpose(-1, -2)
    weights = scores.relu() if weighting == "relu" else scores.float().softmax(-1).to(scores.dtype)
    return weights @ values


def rotate(x: Tensor, positions: Tensor, base: float = _BASE) -> Tensor:
    """Rotary positions (Su et al., 2021), halves as pairs: ``(..., tokens, features)`` at ``(tokens,)``."""
    half = x.shape[-1] // 2
    rates = base ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angles = positions.float()[:, None] * rates
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class AllAttention(nn.Module):
    """Causal attention whose keys are those of the context and `num_vectors` learned ones, under one softmax.

    A block of it needs no feed-forward part: ``LayerNorm(x + AllAttention(x))``. Persistent keys have no position:
    their scores are ``q . k`` with the query not rotated. Multiplications for a token:
    ``4 dim^2 + 2 dim (span + num_vectors)``; as many parameters as a feed-forward part of width `num_vectors`.

    Sukhbaatar, Grave, Lample, Jegou and Joulin, 2019, arXiv 1907.01470.

    Args:
        dim: features.
        num_heads: heads, a divisor of `dim`.
        num_vectors: persistent vectors of each head.
        max_span: the furthest key a query sees; None for all.
        adaptive_span: learn a span for each head (`AdaptiveSpan`), up to `max_span`; the part of the softmax that falls
            outside is divided among the rest, persistent vectors included.
        include_self: whether a token is among its own keys; as published it is not.
        bias: of the four projections.
        dropout: of the weights, once they are normalized.
        position: a learned table of distances (needs `max_span`), rotary, or none.
        relative: the table of another layer, to share it.
        mask_empty: before the text begins there are no keys; False puts zero states there, as published, whose values
            are zero and which take their share of the softmax (needs `max_span`).
        rescale: see `PersistentMemory`.
        ramp, init_span: see `AdaptiveSpan`.
        fused: use torch's fused attention, which computes neither a table of distances nor spans; None where it can.
        generator: of the persistent vectors and the table.

    Raises:
        InputError: a number outside its range, or settings that contradict each other.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_vectors: int,
        *,
        max_span: int | None = None,
        adaptive_span: bool = False,
        include_self: bool = False,
        bias: bool = False,
        dropout: float = 0.0,
        position: Position = "relative",
        relative: RelativePositions | None = None,
        mask_empty: bool = True,
        rescale: bool = True,
        ramp: int = 32,
        init_span: float = 0.0,
        fused: bool | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        _check(dim, num_heads, max_span, adaptive_span, position, relative, mask_empty, fused, dropout)
        head_dim = dim // num_heads
        self.num_heads, self.head_dim, self.max_span = num_heads, head_dim, max_span
        self.include_self, self.dropout, self.position, self.mask_empty = include_self, dropout, position, mask_empty
        self.fused = (position != "relative" and not adaptive_span) if fused is None else fused
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim, bias) for _ in range(4))
        self.persistent = PersistentMemory(num_heads, head_dim, num_vectors, rescale=rescale, generator=generator)
        self.span = AdaptiveSpan(num_heads, max_span or 1, ramp, init_span) if adaptive_span else None
        if position == "relative" and relative is None:
            relative = RelativePositions(head_dim, max_span or 1, generator)
        self.relative = relative if position == "relative" else None

    @property
    def num_vectors(self) -> int:
        """Persistent vectors of each head."""
        return self.persistent.keys.shape[1]

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        """Output ``(batch, tokens, dim)`` for `x` of that shape.

        Args:
            x: the block of tokens.
            memory: what this layer read just before it, ``(batch, earlier tokens, dim)``.

        Raises:
            InputError: another batch or width in `memory`, or a first token without any key.
        """
        if self.fused:
            return self.o_proj(self._join(self._fused(x, memory)))  # type: ignore[no-any-return]
        context, persistent, values, missing = self._weights(x, memory)
        context, persistent = (F.dropout(w, self.dropout, self.training) for w in (context, persistent))
        out = skew(context)[..., missing:] @ values + persistent @ self.persistent()[1].to(x.dtype)
        return self.o_proj(self._join(out))  # type: ignore[no-any-return]

    @torch.no_grad()
    def attention_mass(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        """Share of the softmax that falls on the persistent vectors, by head ``(heads,)``, a mean over tokens."""
        return self._weights(x, memory)[1].float().sum(-1).mean((0, 2))

    def kept(self) -> int | None:
        """How many earlier states a later block of tokens reads; None for all."""
        return self.max_span if self.span is None else self.span.kept()

    def weights(self, x: Tensor, memory: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weights of the context by distance, the nearest key last, and of the persistent vectors.

        Returns:
            ``(batch, heads, tokens, span)`` and ``(batch, heads, tokens, num_vectors)``; together they sum to 1.
        """
        return self._weights(x, memory)[:2]

    def _states(self, x: Tensor, memory: Tensor | None) -> Tensor:
        """The states whose keys the block may read, the block's own last."""
        if memory is not None and (memory.dim() != 3 or memory.shape[::2] != x.shape[::2]):
            raise InputError(
                f"memory: got shape {tuple(memory.shape)}, expected ({x.shape[0]}, earlier tokens, {x.shape[2]}) as the tokens have"
            )
        earlier = x[:, :0] if memory is None else memory.to(x.dtype)
        if (length := self.kept()) is not None:
            length -= self.include_self
            earlier = earlier[:, max(0, earlier.shape[1] - length) :]
            if not self.mask_empty:
                earlier = F.pad(earlier, (0, 0, length - earlier.shape[1], 0))
        if not (earlier.shape[1] or self.include_self or self.num_vectors):
            raise InputError(
                "x: the first token has no key: give memory, or set include_self=True, or num_vectors of at least 1"
            )
        return torch.cat([earlier, x], 1)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _join(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2)

    def _projected(self, x: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries for persistent keys, queries for the context, keys and values ``(batch, heads, tokens, head_dim)``."""
        states = self._states(x, memory)
        plain, k, v = self._split(self.q_proj(x)), self._split(self.k_proj(states)), self._split(self.v_proj(states))
        if self.position != "rope":
            return plain, plain, k, v
        places = torch.arange(states.shape[1], device=x.device)
        return plain, rotate(plain, places[-x.shape[1] :]), rotate(k, places), v

    def _weights(self, x: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor, Tensor, int]:
        """See `weights`; then the context's values, and how many keys are missing before the first."""
        plain, q, k, v = self._projected(x, memory)
        tokens = x.shape[1]
        k, v = (k, v) if self.include_self else (k[..., :-1, :], v[..., :-1, :])
        keys = k.shape[2]
        length = self.kept() or keys
        missing = length + tokens - 1 - keys
        scores = unskew(F.pad(_wide(q @ k.transpose(-1, -2)), (missing, 0), value=-math.inf))
        if self.relative is not None:
            scores = scores + _wide(self.relative(q, length))
        persistent = _wide(plain @ self.persistent()[0].to(x.dtype).transpose(-1, -2))
        joint = (torch.cat([scores, persistent], -1) / math.sqrt(self.head_dim)).softmax(-1)
        context, persistent = joint.split([length, self.num_vectors], -1)
        if self.span is not None:
            context = context * self.span.mask(length)
            total = context.sum(-1, keepdim=True) + persistent.sum(-1, keepdim=True) + 1e-8
            context, persistent = context / total, persistent / total
        return context.to(x.dtype), persistent.to(x.dtype), v, missing

    def _fused(self, x: Tensor, memory: Tensor | None) -> Tensor:
        plain, q, k, v = self._projected(x, memory)
        keys, values = (t.expand(x.shape[0], -1, -1, -1).to(x.dtype) for t in self.persistent())
        if self.position == "rope":  # features that only rotated pairs, or only persistent keys, have
            q, k, keys = torch.cat([q, plain], -1), F.pad(k, (0, self.head_dim)), F.pad(keys, (self.head_dim, 0))
        seen = self._seen(x.shape[1], k.shape[2], x.device)
        return F.scaled_dot_product_attention(
            q,
            torch.cat([k, keys], 2),
            torch.cat([v, values], 2),
            attn_mask=F.pad(seen, (0, self.num_vectors), value=True),
            dropout_p=self.dropout if self.training else 0.0,
            scale=1 / math.sqrt(self.head_dim),
        )

    def _seen(self, tokens: int, keys: int, device: torch.device) -> Tensor:
        """Which keys of the context each token sees ``(tokens, keys)``."""
        places = torch.arange(keys, device=device)
        nearer = places[-tokens:, None] - places - (0 if self.include_self else 1)
        return (nearer >= 0) & (nearer < (self.max_span or keys))

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"heads={self.num_heads}, max_span={self.max_span}, position={self.position!r}, fused={self.fused}"


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check(
    dim: int,
    num_heads: int,
    max_span: int | None,
    adaptive_span: bool,
    position: str,
    relative: RelativePositions | None,
    mask_empty: bool,
    fused: bool | None,
    dropout: float,
) -> None:
    if num_heads < 1 or dim % num_heads:
        raise InputError(f"num_heads: got {num_heads} for {dim} features, expected a divisor")
    if position not in get_args(Position):
        raise unknown_name("position", str(position), get_args(Position))
    if max_span is not None and max_span < 1:
        raise InputError(f"max_span: got {max_span}, expected at least 1, or None")
    if max_span is None and (adaptive_span or position == "relative" or not mask_empty):
        raise InputError("max_span: got None; position='relative', adaptive_span and mask_empty=False need a number")
    if position == "rope" and dim // num_heads % 2:
        raise InputError(f"num_heads: rotary positions need an even width of a head, got {dim // num_heads}")
    if fused and (adaptive_span or position == "relative"):
        raise InputError("fused: fused attention has neither adaptive_span nor position='relative'; set fused=False")
    shape = (dim // num_heads, max_span)
    if relative is not None and tuple(relative.weight.shape) != shape:
        raise InputError(f"relative: got a table of {tuple(relative.weight.shape)}, expected {shape}")
    if not 0 <= dropout < 1:
        raise InputError(f"dropout: got {dropout}, expected 0 or more and less than 1")
