"""Attention whose heads keep their width however many there are: the inner width is free of the layer's (2022)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

from layerwright.core.errors import InputError, unknown_name
from layerwright.nn import _attention_kinds as kinds

__all__ = ["CAUSAL_KINDS", "AttentionKind", "WideAttention"]

AttentionKind = Literal["softmax", "local", "linear", "linformer", "performer", "synthesizer"]
CAUSAL_KINDS: tuple[AttentionKind, ...] = ("softmax", "local", "linear", "performer")
"""Kinds that can keep to earlier tokens."""


class WideAttention(nn.Module):
    """Self-attention of `num_heads` heads of `head_dim` features each: ``dim -> num_heads head_dim -> dim``.

    The four projections hold ``4 dim num_heads head_dim`` numbers, so that layers that share out a number of heads among
    them hold as many as one layer with all of them. For a token, softmax takes ``8 dim num_heads head_dim + 4 tokens
    num_heads head_dim`` floating-point operations. All kinds are linear in the values.

    Source: Brown, Zhao, Shumailov and Mullins, 2022, Wide Attention Is The Way Forward For Transformers?, arXiv 2210.00640.

    Args:
        dim: features of a token.
        num_heads, head_dim: heads and features of each, of any product.
        kind: ``softmax``; ``local`` softmax over a window; ``linear`` with elu + 1; ``linformer`` with learned
            projections of the sequence; ``performer`` with positive orthogonal random features; ``synthesizer`` with
            learned scores for pairs of positions, without queries and keys.
        causal: keep to earlier tokens and the token itself.
        bias: of the projections.
        window: of ``local``, odd: the keys around a query, or the last ones with `causal`.
        rank: of ``linformer``: rows that stand for the sequence, for each head.
        features: of ``performer``: random features of a head.
        max_len: the longest sequence of ``linformer`` and ``synthesizer``, which need it.
        seed: of the weights; the global generator is left alone.

    Raises:
        InputError: a number outside its range, or `causal` with a kind that has no causal form.
    """

    projection: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int,
        kind: AttentionKind = "softmax",
        causal: bool = False,
        *,
        bias: bool = False,
        window: int = 65,
        rank: int = 32,
        features: int = 64,
        max_len: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        _check(dim, num_heads, head_dim, kind, causal, window, rank, features, max_len)
        self.dim, self.num_heads, self.head_dim = dim, num_heads, head_dim
        self.kind, self.causal, self.window, self.rank, self.features = kind, causal, window, rank, features
        self.max_len = max_len
        inner, length = num_heads * head_dim, max_len or 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if kind != "synthesizer":
                self.q_proj, self.k_proj = nn.Linear(dim, inner, bias), nn.Linear(dim, inner, bias)
            self.v_proj, self.o_proj = nn.Linear(dim, inner, bias), nn.Linear(inner, dim, bias)
            if kind == "linformer":
                self.key_rows = nn.Parameter(torch.randn(num_heads, rank, length) / length**0.5)
                self.value_rows = nn.Parameter(torch.randn(num_heads, rank, length) / length**0.5)
            elif kind == "synthesizer":
                self.scores = nn.Parameter(torch.randn(num_heads, length, length))
            elif kind == "performer":
                self.register_buffer("projection", kinds.orthogonal_gaussian(features, head_dim))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Output ``(batch, tokens, dim)`` for `x` of that shape.

        Args:
            x: tokens.
            mask: ``(batch, tokens)``, False or 0 for padding, which no token attends to; a row of padding alone gives 0
                before the output projection.

        Raises:
            InputError: a mask of another shape, or more than `max_len` tokens.
        """
        return self.o_proj(self._heads(x, mask).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def head_outputs(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """What each head adds to the output, ``(batch, heads, tokens, dim)``: the layer is their sum (and its bias)."""
        blocks = self.o_proj.weight.unflatten(1, (self.num_heads, self.head_dim)).permute(1, 2, 0)
        return self._heads(x, mask) @ blocks

    @torch.no_grad()
    def weights(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """How much of each value a token takes, ``(batch, heads, tokens, tokens)``, for any kind.

        Rows sum to 1 but for ``linformer``, whose projections are free. Memory: ``tokens^2`` for each head.
        """
        keep = self._keep(x, mask)
        identity = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        return self._attend(x, identity.expand(x.shape[0], self.num_heads, -1, -1), keep)

    @torch.no_grad()
    def redraw_(self, seed: int) -> None:
        """Draw the random features of a ``performer`` again, in place.

        Raises:
            InputError: another kind.
        """
        if self.kind != "performer":
            raise InputError(f"redraw_: got kind {self.kind!r}, expected 'performer', which has random features")
        drawn = kinds.orthogonal_gaussian(self.features, self.head_dim, torch.Generator().manual_seed(seed))
        self.projection.copy_(drawn)

    def projection_parameters(self) -> int:
        """Numbers in the projections of tokens, without biases: ``4 dim num_heads head_dim`` (half for synthesizers)."""
        return sum(m.weight.numel() for m in self.children() if isinstance(m, nn.Linear))

    def spec(self) -> dict[str, Any]:
        """Plain data from which `empty` builds the same form."""
        return {"type": "wide_attention", "bias": self.o_proj.bias is not None} | {
            name: getattr(self, name)
            for name in ("dim", "num_heads", "head_dim", "kind", "causal", "window", "rank", "features", "max_len")
        }

    @classmethod
    def empty(cls, spec: Mapping[str, Any]) -> Self:
        """A layer of that form."""
        return cls(**{name: value for name, value in spec.items() if name != "type"})

    def _keep(self, x: Tensor, mask: Tensor | None) -> Tensor | None:
        if x.dim() != 3 or x.shape[2] != self.dim:
            raise InputError(f"x: got shape {tuple(x.shape)}, expected (batch, tokens, {self.dim})")
        if self.kind in ("linformer", "synthesizer") and x.shape[1] > (self.max_len or 0):
            raise InputError(f"x: got {x.shape[1]} tokens, expected at most max_len={self.max_len} of this {self.kind}")
        if mask is not None and mask.shape != x.shape[:2]:
            raise InputError(f"mask: got shape {tuple(mask.shape)}, expected (batch, tokens) = {tuple(x.shape[:2])}")
        return None if mask is None else mask.bool()

    def _heads(self, x: Tensor, mask: Tensor | None) -> Tensor:
        keep = self._keep(x, mask)
        return self._attend(x, self._split(self.v_proj(x)), keep)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _attend(self, x: Tensor, v: Tensor, keep: Tensor | None) -> Tensor:
        """Values ``(batch, heads, tokens, features)`` as the tokens `x` mix them."""
        if self.kind == "synthesizer":
            return kinds.synthesizer_attention(v, keep, self.scores)
        q, k = self._split(self.q_proj(x)), self._split(self.k_proj(x))
        if self.kind == "softmax":
            return kinds.softmax_attention(q, k, v, keep, self.causal)
        if self.kind == "local":
            return kinds.local_attention(q, k, v, keep, self.causal, self.window)
        if self.kind == "linformer":
            return kinds.linformer_attention(q, k, v, keep, self.key_rows, self.value_rows)
        if self.kind == "linear":
            q, k = kinds.elu_features(q), kinds.elu_features(k)
        else:
            k = kinds.performer_features(k, self.projection, True, keep)
            q = kinds.performer_features(q, self.projection, False)
        return kinds.feature_attention(q, k, v, keep, self.causal)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{self.dim}, heads={self.num_heads}x{self.head_dim}, kind={self.kind!r}, causal={self.causal}"


def _check(
    dim: int,
    num_heads: int,
    head_dim: int,
    kind: str,
    causal: bool,
    window: int,
    rank: int,
    features: int,
    max_len: int | None,
) -> None:
    sizes = {"dim": dim, "num_heads": num_heads, "head_dim": head_dim, "rank": rank, "features": features}
    for name, value in sizes.items():
        if value < 1:
            raise InputError(f"{name}: got {value}, expected at least 1")
    if kind not in get_args(AttentionKind):
        raise unknown_name("kind of attention", kind, get_args(AttentionKind))
    if window < 1 or window % 2 == 0:
        raise InputError(f"window: got {window}, expected an odd number, so that a token stands in its middle")
    if causal and kind not in CAUSAL_KINDS:
        raise InputError(f"causal: {kind} has no causal form; take one of {', '.join(CAUSAL_KINDS)}")
    if kind in ("linformer", "synthesizer") and (max_len is None or max_len < 1):
        raise InputError(f"max_len: got {max_len}, expected the longest sequence, at least 1, which {kind} needs")
