"""A language model of all-attention layers alone (Sukhbaatar et al., 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from layerwright.core.errors import InputError
from layerwright.nn.all_attention import AllAttention, RelativePositions

__all__ = ["AllAttentionBlock", "AllAttentionLM"]


class AllAttentionBlock(nn.Module):
    """``LayerNorm(x + attention(x))``, and the same around a feed-forward part where there is one.

    Args:
        attention: reads ``(batch, tokens, dim)``.
        dim: features.
        ffn: width of a feed-forward part for comparison; 0 for none, as published.
    """

    def __init__(self, attention: AllAttention, dim: int, ffn: int = 0) -> None:
        super().__init__()
        self.attention, self.norm = attention, nn.LayerNorm(dim)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn), nn.ReLU(), nn.Linear(ffn, dim)) if ffn else None
        self.ffn_norm = nn.LayerNorm(dim) if ffn else None

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        """``(batch, tokens, dim)`` to the same."""
        x = self.norm(x + self.attention(x, memory))
        return x if self.ffn is None or self.ffn_norm is None else self.ffn_norm(x + self.ffn(x))


class AllAttentionLM(nn.Module):
    """Embedding, blocks of one kind of layer (normalized after the residual sum), logits.

    One table of distances serves all heads and layers. Text longer than a block is read block by block: `read` hands
    on the states of the last positions of each layer, detached.

    Sukhbaatar, Grave, Lample, Jegou and Joulin, 2019, arXiv 1907.01470.

    Args:
        vocabulary: tokens.
        dim, layers, heads: width, blocks, heads.
        num_vectors: persistent vectors of each head and layer; about half as many as a feed-forward part is wide.
        max_span: the furthest key that a token sees.
        ffn: width of feed-forward parts, for comparison.
        seed: of the weights; the global generator is left alone.
        settings: further arguments of `AllAttention`.

    Raises:
        InputError: see `AllAttention`; no layer.
    """

    def __init__(
        self,
        vocabulary: int,
        dim: int,
        layers: int,
        heads: int,
        num_vectors: int,
        *,
        max_span: int | None,
        ffn: int = 0,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__()
        if layers < 1:
            raise InputError(f"layers: got {layers}, expected at least 1")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(vocabulary, dim)
            self.blocks = nn.ModuleList()
            table: RelativePositions | None = None
            for _ in range(layers):
                made = AllAttention(dim, heads, num_vectors, max_span=max_span, relative=table, **settings)
                table = made.relative
                self.blocks.append(AllAttentionBlock(made, dim, ffn))
            self.head = nn.Linear(dim, vocabulary)

    @property
    def attentions(self) -> tuple[AllAttention, ...]:
        """The attention of each block."""
        return tuple(module for module in self.modules() if isinstance(module, AllAttention))

    def forward(self, ids: Tensor) -> Tensor:
        """Logits ``(batch, tokens, vocabulary)`` of ids ``(batch, tokens)`` with nothing before them."""
        return self.read(ids)[0]

    def read(self, ids: Tensor, memory: Sequence[Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Logits of a block of ids ``(batch, tokens)``, and the memory for the next block.

        Args:
            ids: the block.
            memory: what the block before it gave: for each layer ``(batch, positions, dim)``.

        Raises:
            InputError: a memory of another number of layers, batch or width.
        """
        if memory is not None and len(memory) != len(self.blocks):
            raise InputError(f"memory: got {len(memory)} layers, expected {len(self.blocks)}")
        x, kept = self.embedding(ids), []
        for number, (block, attention) in enumerate(zip(self.blocks, self.attentions, strict=True)):
            earlier = None if memory is None else memory[number]
            states = x.detach() if earlier is None else torch.cat([earlier.to(x.dtype), x.detach()], 1)
            length = attention.kept()
            kept.append(states if length is None else states[:, max(0, states.shape[1] - length) :])
            x = block(x, earlier)
        logits: Tensor = self.head(x)
        return logits, tuple(kept)

    @torch.no_grad()
    def attention_mass(self, ids: Tensor) -> Tensor:
        """Share of each softmax that falls on persistent vectors, ``(layers, heads)``, a mean over tokens."""
        x, found = self.embedding(ids), []
        for block, attention in zip(self.blocks, self.attentions, strict=True):
            found.append(attention.attention_mass(x))
            x = block(x)
        return torch.stack(found)

    def span_penalty(self) -> Tensor:
        """Sum over layers of the mean span in tokens; 0 without adaptive spans."""
        spans = [attention.span.penalty() for attention in self.attentions if attention.span is not None]
        return torch.stack(spans).sum() if spans else torch.zeros(())

    def clamp_spans_(self) -> None:
        """Bring all spans back to their range, in place; call it after each step of the optimizer."""
        for attention in self.attentions:
            if attention.span is not None:
                attention.span.clamp_()
