"""Encoders of one number of heads in layers that are few and wide, or many and narrow (Brown et al., 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from layerwright.core.errors import InputError, unknown_name
from layerwright.nn.wide_attention import AttentionKind, WideAttention

__all__ = ["AspectBlock", "AspectEncoder", "llama_family"]

Pool = Literal["mean", "cls"]


class AspectBlock(nn.Module):
    """``x + attention(norm(x))``, then ``x + ffn(norm(x))``.

    Args:
        attention: reads ``(batch, tokens, dim)`` and a mask.
        ffn_dim: width of the feed-forward part.
        dropout: of what either part adds.
    """

    def __init__(self, attention: WideAttention, ffn_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        dim = attention.dim
        self.attention_norm, self.attention = nn.LayerNorm(dim), attention
        self.ffn_norm = nn.LayerNorm(dim)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU(), nn.Linear(ffn_dim, dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(batch, tokens, dim)`` to the same."""
        x = x + self.dropout(self.attention(self.attention_norm(x), mask))
        return x + self.dropout(self.ffn(self.ffn_norm(x)))


class AspectEncoder(nn.Module):
    """Embedding, positions, `layers` blocks of `heads_per_layer` heads, a norm, a pool, and a classifier.

    Width, width of a head and of the feed-forward parts do not depend on the aspect ratio: with as many heads in all,
    attention has as many parameters and operations, and there are `layers` feed-forward parts. For each token they take
    ``8 dim heads head_dim + 4 tokens heads head_dim`` (softmax, all heads) and ``4 dim ffn_dim layers`` operations.

    Source: Brown, Zhao, Shumailov and Mullins, 2022, arXiv 2210.00640. Norms stand before the parts.

    Args:
        vocabulary: tokens.
        dim, head_dim, ffn_dim: features of a token, of a head, inside feed-forward parts.
        layers, heads_per_layer: the aspect ratio.
        max_len: the longest sequence.
        classes: of the classifier; None gives pooled features.
        pool: mean over tokens, or a learned token in front of the others.
        attention: see `WideAttention`; `settings` are further arguments of it (`window`, `rank`, `features`).
        dropout: of what blocks add.
        seed: of the weights; the global generator is left alone.

    Raises:
        InputError: a number outside its range, or an unknown name.
    """

    def __init__(
        self,
        vocabulary: int,
        dim: int,
        head_dim: int,
        layers: int,
        heads_per_layer: int,
        ffn_dim: int,
        max_len: int,
        *,
        classes: int | None = None,
        pool: Pool = "mean",
        attention: AttentionKind = "softmax",
        dropout: float = 0.0,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__()
        sizes = {"vocabulary": vocabulary, "layers": layers, "ffn_dim": ffn_dim, "max_len": max_len}
        sizes["classes"] = 1 if classes is None else classes
        for name, size in sizes.items():
            if size < 1:
                raise InputError(f"{name}: got {size}, expected at least 1")
        if pool not in get_args(Pool):
            raise unknown_name("pool", pool, get_args(Pool))
        if unknown := sorted(settings.keys() - {"window", "rank", "features"}):
            raise unknown_name("setting of attention", unknown[0], ("window", "rank", "features"))
        self.pool, self.max_len, self.dim = pool, max_len, dim
        length = max_len + (pool == "cls")
        made = [
            WideAttention(
                dim, heads_per_layer, head_dim, attention, max_len=length, seed=1009 * seed + 1 + number, **settings
            )
            for number in range(layers)
        ]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding, self.positions = nn.Embedding(vocabulary, dim), nn.Embedding(length, dim)
            nn.init.normal_(self.embedding.weight, std=0.5)
            nn.init.normal_(self.positions.weight, std=0.5)
            self.first = nn.Parameter(torch.randn(dim) * 0.5) if pool == "cls" else None
            self.blocks = nn.ModuleList(AspectBlock(layer, ffn_dim, dropout) for layer in made)
            self.norm = nn.LayerNorm(dim)
            self.head = nn.Identity() if classes is None else nn.Linear(dim, classes)

    @property
    def attentions(self) -> tuple[WideAttention, ...]:
        """The attention of each layer."""
        return tuple(module for module in self.modules() if isinstance(module, WideAttention))

    @property
    def layers(self) -> int:
        """Blocks."""
        return len(self.blocks)

    @property
    def heads_per_layer(self) -> int:
        """Heads of each block."""
        return self.attentions[0].num_heads

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits ``(batch, classes)``, or pooled features without a classifier.

        Args:
            ids: ``(batch, tokens)``.
            mask: of that shape, False or 0 for padding.

        Raises:
            InputError: too many tokens, a mask of another shape, or a sequence of padding alone.
        """
        return self.head(self.encode(ids, mask))  # type: ignore[no-any-return]

    def encode(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Pooled features ``(batch, dim)``: two texts are matched by what this gives for each."""
        x, keep = self._embedded(ids, mask)
        for block in self.blocks:
            x = block(x, keep)
        x = self.norm(x)
        return (x * self._shares(ids, mask)[..., None].to(x.dtype)).sum(1)

    @torch.no_grad()
    def importances(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """How much of the last layer's attention in the pooled output falls on each position, ``(batch, positions)``.

        A mean over heads and, with ``pool="mean"``, over queries. With one layer the positions are the input tokens
        themselves; with more they are states that earlier layers have mixed. With ``cls`` the learned token comes first.
        """
        x, keep = self._embedded(ids, mask)
        for block in self.blocks[:-1]:
            x = block(x, keep)
        last = self.blocks[-1]
        assert isinstance(last, AspectBlock)
        weights = last.attention.weights(last.attention_norm(x), keep).float().mean(1)
        return torch.einsum("bi,bij->bj", self._shares(ids, mask), weights)

    def attention_parameters(self) -> int:
        """Numbers in the projections of all heads: ``4 dim head_dim heads`` (half for synthesizers)."""
        return sum(attention.projection_parameters() for attention in self.attentions)

    def body_parameters(self) -> int:
        """All parameters but the tables of tokens and positions."""
        tables = self.embedding.weight.numel() + self.positions.weight.numel()
        return sum(parameter.numel() for parameter in self.parameters()) - tables

    @classmethod
    def family(cls, total_heads: int, layers: Sequence[int] = (1, 2, 3, 6), **fixed: Any) -> list[AspectEncoder]:
        """Encoders that share out `total_heads` heads over so many layers, with everything else equal.

        Args:
            total_heads: of each encoder.
            layers: of each encoder; each divides `total_heads`.
            fixed: further arguments, for all of them.

        Raises:
            InputError: no layers, a number of layers that does not divide the heads, or an aspect ratio in `fixed`.
        """
        _divided(total_heads, layers)
        if given := fixed.keys() & {"layers", "heads_per_layer"}:
            raise InputError(f"{sorted(given)[0]}: a family sets it, from total_heads and layers")
        models = [cls(layers=depth, heads_per_layer=total_heads // depth, **fixed) for depth in layers]
        sizes = {sum(_numbers(attention) for attention in model.attentions) for model in models}
        if len(sizes) > 1:
            raise InputError(
                f"family: attention has {sorted(sizes)} parameters, expected as many at every aspect ratio"
            )
        return models

    def _embedded(self, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if ids.dim() != 2 or not 1 <= ids.shape[1] <= self.max_len:
            raise InputError(f"ids: got shape {tuple(ids.shape)}, expected (batch, 1 to {self.max_len} tokens)")
        if mask is not None and mask.shape != ids.shape:
            raise InputError(f"mask: got shape {tuple(mask.shape)}, expected {tuple(ids.shape)} as the ids have")
        keep = None if mask is None else mask.bool()
        if keep is not None and not bool(keep.any(1).all()):
            raise InputError("mask: a sequence is padding alone; leave it out: there is nothing to pool")
        x = self.embedding(ids)
        if self.first is not None:
            x = torch.cat([self.first.expand(len(x), 1, -1), x], 1)
            keep = None if keep is None else nn.functional.pad(keep, (1, 0), value=True)
        return x + self.positions.weight[: x.shape[1]], keep

    def _shares(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Share of each position in the pool, ``(batch, positions)``."""
        if self.pool == "cls":
            return nn.functional.one_hot(ids.new_zeros(len(ids)), ids.shape[1] + 1).float()
        weights = torch.ones_like(ids, dtype=torch.float32) if mask is None else mask.bool().float()
        return weights / weights.sum(1, keepdim=True)


def _numbers(attention: WideAttention) -> int:
    return sum(parameter.numel() for parameter in attention.parameters())


def _divided(total_heads: int, layers: Sequence[int]) -> None:
    if not layers:
        raise InputError("layers: got none, expected at least one number of layers")
    if total_heads < 1:
        raise InputError(f"total_heads: got {total_heads}, expected at least 1")
    if bad := [depth for depth in layers if depth < 1 or total_heads % depth]:
        raise InputError(f"layers: got {bad}, expected divisors of total_heads={total_heads}")


def llama_family(total_heads: int, layers: Sequence[int] = (1, 2, 3, 6), *, head_dim: int, **fields: Any) -> list[Any]:
    """Configurations of transformers' Llama that share out `total_heads` heads of `head_dim` features over the layers.

    Llama's heads have a width of their own, and so do those of its kin (Mistral, Qwen 3, Gemma); BERT's have none.

    Args:
        total_heads, layers: see `AspectEncoder.family`.
        head_dim: features of a head, whatever the width of the model.
        fields: further fields of ``LlamaConfig``.

    Raises:
        InputError: see `AspectEncoder.family`; a field that the aspect ratio sets; heads that do not divide the width.
    """
    from transformers import LlamaConfig

    _divided(total_heads, layers)
    if head_dim < 1:
        raise InputError(f"head_dim: got {head_dim}, expected at least 1")
    if given := fields.keys() & {"num_hidden_layers", "num_attention_heads", "num_key_value_heads"}:
        raise InputError(f"{sorted(given)[0]}: the family sets it, from total_heads and layers")
    hidden = fields.get("hidden_size", LlamaConfig().hidden_size)
    if bad := [total_heads // depth for depth in layers if hidden % (total_heads // depth)]:
        raise InputError(f"hidden_size: got {hidden}, expected a multiple of {bad} heads, which transformers asks for")
    return [
        LlamaConfig(
            num_hidden_layers=depth,
            num_attention_heads=total_heads // depth,
            num_key_value_heads=total_heads // depth,
            head_dim=head_dim,
            **fields,
        )
        for depth in layers
    ]
