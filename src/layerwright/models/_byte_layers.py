"""Parts of `ByteSeq2Seq`: attention with a cache, post-norm layers, positions."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from layerwright.nn.one_hot import OneHotEmbedding, TokenDropout

__all__ = ["ByteInput", "DecoderCache", "DecoderLayer", "EncoderLayer", "sinusoids"]


@dataclass
class DecoderCache:
    """Keys and values of a decoder, ``(rows, heads, tokens, features)`` for each of its layers.

    Attributes:
        own: of the tokens before.
        cross: of the source.
    """

    own: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    cross: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def reorder_(self, rows: Tensor) -> None:
        """Let row `i` go on from row ``rows[i]``, both of the same source."""
        self.own = [(keys[rows], values[rows]) for keys, values in self.own]


def sinusoids(count: int, dim: int, first: int = 0) -> Tensor:
    """Sines then cosines of positions ``(count, dim)`` from `first` on, as in the Transformer."""
    half = (dim + 1) // 2
    rates = torch.exp(torch.arange(half) * -(math.log(10_000) / max(1, half - 1)))
    angles = torch.arange(first, first + count)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :dim]


class ByteInput(nn.Module):
    """Vectors of tokens and their positions: an embedding (times the root of its width) or one-hot vectors.

    Args:
        embedding: either kind.
        token_dropout: on the tokens' part.
        dropout: of features, on the sum.
    """

    def __init__(self, embedding: nn.Embedding | OneHotEmbedding, token_dropout: TokenDropout, dropout: float) -> None:
        super().__init__()
        self.embedding, self.token_dropout, self.dropout = embedding, token_dropout, nn.Dropout(dropout)

    def forward(self, ids: Tensor, first: int = 0) -> Tensor:
        """Vectors ``(batch, tokens, dim)``; the position of the first token is `first`."""
        x: Tensor = self.embedding(ids)
        if isinstance(self.embedding, nn.Embedding):
            x = x * math.sqrt(x.shape[-1])
        positions = sinusoids(ids.shape[1], x.shape[-1], first).to(x)
        output: Tensor = self.dropout(self.token_dropout(x, ids) + positions)
        return output


class Attention(nn.Module):
    """Attention of several heads; keys and values come from elsewhere or from a cache."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))
        _start_(self.query, self.key, self.value, self.out)

    def pair(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of `x` ``(batch, tokens, dim)``."""
        return self._split(self.key(x)), self._split(self.value(x))

    def forward(
        self, x: Tensor, pair: tuple[Tensor, Tensor], mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """`mask` is True for keys that count and broadcasts to ``(batch, heads, queries, keys)``."""
        mixed = nn.functional.scaled_dot_product_attention(
            self._split(self.query(x)), *pair, attn_mask=mask, is_causal=causal
        )
        output: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return output

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)


class FeedForward(nn.Sequential):
    """Two linear layers with a ReLU between them."""

    def __init__(self, dim: int, ffn: int) -> None:
        first, second = nn.Linear(dim, ffn), nn.Linear(ffn, dim)
        super().__init__(first, nn.ReLU(), second)
        _start_(first, second)


def _start_(*linears: nn.Linear) -> None:
    for linear in linears:
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)


class EncoderLayer(nn.Module):
    """Attention and a feed-forward part, each followed by a norm."""

    def __init__(self, dim: int, heads: int, ffn: int, dropout: float) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(dim, heads), FeedForward(dim, ffn)
        self.attention_norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """`x` ``(batch, tokens, dim)``; `mask` ``(batch, 1, 1, tokens)``, True for tokens that count."""
        x = self.attention_norm(x + self.dropout(self.attention(x, self.attention.pair(x), mask)))
        output: Tensor = self.mlp_norm(x + self.dropout(self.mlp(x)))
        return output


class DecoderLayer(nn.Module):
    """Causal attention, attention to the source and a feed-forward part, each followed by a norm."""

    def __init__(self, dim: int, heads: int, ffn: int, dropout: float) -> None:
        super().__init__()
        self.attention, self.cross, self.mlp = Attention(dim, heads), Attention(dim, heads), FeedForward(dim, ffn)
        self.attention_norm, self.cross_norm, self.mlp_norm = (nn.LayerNorm(dim) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, source: tuple[Tensor, Tensor], source_mask: Tensor, own_mask: Tensor | None) -> Tensor:
        """All tokens at once; `own_mask` ``(batch, 1, tokens, tokens)`` or None for the causal one."""
        mixed = self.attention(x, self.attention.pair(x), own_mask, causal=own_mask is None)
        return self._rest(x, mixed, source, source_mask)

    def step(
        self, x: Tensor, own: tuple[Tensor, Tensor] | None, source: tuple[Tensor, Tensor], source_mask: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """One more token ``(rows, 1, dim)``; the keys and values that it leaves."""
        pair = self.attention.pair(x)
        if own is not None:
            pair = torch.cat([own[0], pair[0]], 2), torch.cat([own[1], pair[1]], 2)
        return self._rest(x, self.attention(x, pair), source, source_mask), pair

    def _rest(self, x: Tensor, mixed: Tensor, source: tuple[Tensor, Tensor], source_mask: Tensor) -> Tensor:
        x = self.attention_norm(x + self.dropout(mixed))
        x = self.cross_norm(x + self.dropout(self.cross(x, source, source_mask)))
        output: Tensor = self.mlp_norm(x + self.dropout(self.mlp(x)))
        return output
