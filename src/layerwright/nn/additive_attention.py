"""Attention at linear cost: one learnt vector weighs the queries, and their sum gates the keys."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from layerwright.core.errors import InputError, unknown_name

__all__ = ["EfficientAdditiveAttention", "QueryWeights"]

QueryWeights = Literal["l2", "ones"]


class EfficientAdditiveAttention(nn.Module):
    """``out = Wf (Wp (g * K) + Q)`` with the global query ``g = sum over tokens a Q``; all tokens see one another in `g`.

    Queries and keys are normalised over their features. The weights ``a = (Q w) / sqrt(dim)`` are normalised over the
    tokens by their Euclidean length, not by a softmax, so that they may be negative. Neither values nor a matrix of
    tokens by tokens: ``4 N dim^2`` multiply-adds and ``O(N dim)`` memory.

    Source: Shaker et al., "SwiftFormer: Efficient Additive Attention for Transformer-based Real-time Mobile Vision
    Applications" (2023, arXiv 2303.15446).

    Args:
        dim: features of a token.
        num_heads: the inner width is ``num_heads * dim``; 1 in the published networks.
        out_dim: features of the output, `dim` if left out.
        eps: least length that is divided by.
        query_weights: ``l2`` as above; ``ones`` adds the queries as they are, which is what the SwiftFormer of the
            package transformers computes, since its softmax runs over an axis of length 1.

    Raises:
        InputError: a number below 1, or unknown weights.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        out_dim: int | None = None,
        eps: float = 1e-12,
        query_weights: QueryWeights = "l2",
    ) -> None:
        super().__init__()
        for name, count in (("dim", dim), ("num_heads", num_heads), ("out_dim", dim if out_dim is None else out_dim)):
            if count < 1:
                raise InputError(f"{name}: got {count}, expected at least 1")
        if query_weights not in get_args(QueryWeights):
            raise unknown_name("query_weights", str(query_weights), get_args(QueryWeights))
        self.dim, self.num_heads, self.eps, self.query_weights = dim, num_heads, eps, query_weights
        inner = dim * num_heads
        self.to_query, self.to_key = nn.Linear(dim, inner), nn.Linear(dim, inner)
        self.w_g = nn.Parameter(torch.empty(inner, 1))
        self.proj, self.final = nn.Linear(inner, inner), nn.Linear(inner, out_dim or dim)
        if not self.w_g.is_meta:
            nn.init.normal_(self.w_g)

    def forward(
        self, x: Tensor, attention_mask: Tensor | None = None, *, return_weights: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Output ``(batch, tokens, out_dim)``, with `return_weights` also `a` ``(batch, tokens, 1)``.

        Args:
            x: ``(batch, tokens, dim)``.
            attention_mask: None, since the global query holds all tokens.

        Raises:
            InputError: another shape, no tokens, or a mask.
            TypeError: whole numbers.
        """
        if attention_mask is not None:
            raise InputError("attention_mask: additive attention sums over all tokens and takes none; leave it out")
        if not x.is_floating_point():
            raise TypeError(f"x: got {x.dtype}, expected floating-point numbers")
        if x.dim() != 3 or x.shape[2] != self.dim or not x.shape[1]:
            raise InputError(f"x: got shape {tuple(x.shape)}, expected (batch, at least one token, {self.dim})")
        query, key = self._unit(self.to_query(x), -1), self._unit(self.to_key(x), -1)
        weights = query @ self.w_g * self.dim**-0.5
        weights = self._unit(weights, 1) if self.query_weights == "l2" else torch.ones_like(weights)
        global_query = weights.transpose(1, 2) @ query
        out: Tensor = self.final(self.proj(global_query * key) + query)
        return (out, weights) if return_weights else out

    def _unit(self, x: Tensor, axis: int) -> Tensor:
        """`x` over its length along `axis`; lengths of half-precision numbers are summed in float32."""
        wide = torch.promote_types(x.dtype, torch.float32)
        length = torch.linalg.vector_norm(x, dim=axis, keepdim=True, dtype=wide).clamp_min(self.eps)
        return x * (1 / length).to(x.dtype)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{self.dim}, num_heads={self.num_heads}, query_weights={self.query_weights!r}"
