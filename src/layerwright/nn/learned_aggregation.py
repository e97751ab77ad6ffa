"""Pooling by attention: learnt queries decide how much each position of a map counts."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from layerwright.core.errors import InputError
from layerwright.nn.drop_path import DropPath

__all__ = ["ClassAttentionHead", "LearnedAggregation"]


class LearnedAggregation(nn.Module):
    """One transformer block in which learnt queries read a map that itself stays as it is.

    With the queries `c` and the positions `X`, ``Z = LN(c, X)`` and ``A = softmax(Wq Z_c (Wk Z)^T / sqrt(dim / heads))``:
    ``c <- c + g1 * Wo(A Wv Z)``, then ``c <- c + g2 * MLP(LN(c))`` with one hidden layer and GELU. The weights `A` say
    what each position contributed. ``2 N dim^2`` multiply-adds for the keys and values of `N` positions, little else.

    Source: Touvron et al., "Augmenting Convolutional networks with attention-based aggregation" (2021, arXiv
    2112.13692).

    Args:
        dim: channels.
        num_heads: 1 in the published networks, so that there is one map.
        mlp_ratio: hidden channels over `dim`.
        qkv_bias: whether the projections of queries, keys and values have biases.
        layer_scale: first values of `g1` and `g2`, one for each channel.
        drop_path: rate of both branches.
        num_queries: one, or one for each class.
        keys_include_query: the queries are among the keys and values; not so with one query for each class.

    Raises:
        InputError: a number outside its range.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        mlp_ratio: float = 3.0,
        qkv_bias: bool = True,
        layer_scale: float = 1e-4,
        drop_path: float = 0.0,
        num_queries: int = 1,
        keys_include_query: bool = True,
    ) -> None:
        super().__init__()
        for name, count in (("dim", dim), ("num_heads", num_heads), ("num_queries", num_queries)):
            if count < 1:
                raise InputError(f"{name}: got {count}, expected at least 1")
        if dim % num_heads:
            raise InputError(f"num_heads: got {num_heads} for {dim} channels, expected a divisor of dim")
        hidden = int(dim * mlp_ratio)
        if hidden < 1:
            raise InputError(f"mlp_ratio: got {mlp_ratio} for {dim} channels, expected at least one hidden channel")
        self.dim, self.num_heads, self.keys_include_query = dim, num_heads, keys_include_query
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim, bias=qkv_bias) for _ in range(3))
        self.o_proj = nn.Linear(dim, dim)
        self.fc1, self.act, self.fc2 = nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)
        self.layer_scale_1 = nn.Parameter(torch.full((dim,), layer_scale))
        self.layer_scale_2 = nn.Parameter(torch.full((dim,), layer_scale))
        self.drop_path = DropPath(drop_path)
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.o_proj, self.fc1, self.fc2):
            _start_(layer)
        self.reset_queries_(num_queries)

    @property
    def num_queries(self) -> int:
        """Queries, and so tokens that come out."""
        return self.queries.shape[1]

    def reset_queries_(self, count: int) -> None:
        """Put `count` new queries, truncated normal with deviation 0.02."""
        like = self.q_proj.weight
        self.queries = nn.Parameter(torch.empty(1, count, self.dim, device=like.device, dtype=like.dtype))
        nn.init.trunc_normal_(self.queries, std=0.02)

    def forward(self, x: Tensor, *, return_attention: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Tokens ``(batch, num_queries, dim)``, with `return_attention` also weights ``(batch, heads, num_queries, N)``.

        The weights are those of the `N` positions; where queries are among the keys, theirs is what is missing to 1.

        Args:
            x: ``(batch, N, dim)``, or a map ``(batch, dim, height, width)``.

        Raises:
            InputError: another shape, or no position.
            TypeError: whole numbers.
        """
        query, key, value = self._projected(self._positions(x))
        if return_attention:
            weights = self._weights(query, key)
            mixed = weights @ value
        else:
            mixed = functional.scaled_dot_product_attention(query, key, value)
        gathered = self.o_proj(mixed.transpose(1, 2).flatten(2))
        tokens = self.queries + self.drop_path(self.layer_scale_1 * gathered)
        tokens = tokens + self.drop_path(self.layer_scale_2 * self.fc2(self.act(self.fc1(self.norm2(tokens)))))
        return (tokens, self._of_positions(weights)) if return_attention else tokens

    def attention(self, x: Tensor) -> Tensor:
        """The weights alone; see `forward`."""
        query, key, _ = self._projected(self._positions(x))
        return self._of_positions(self._weights(query, key))

    def _positions(self, x: Tensor) -> Tensor:
        """``(batch, N, dim)``."""
        _check_features(x, self.dim)
        return x.flatten(2).transpose(1, 2) if x.dim() == 4 else x

    def _projected(self, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values ``(batch, heads, tokens, dim / heads)``."""
        batch = len(positions)
        asking, read = self.norm1(self.queries), self.norm1(positions)
        # Queries are the same for every sample, so that they are projected once.
        query = self.q_proj(asking).expand(batch, -1, -1)
        if self.keys_include_query:
            read = torch.cat([asking.expand(batch, -1, -1), read], 1)
        parts = (query, self.k_proj(read), self.v_proj(read))
        query, key, value = (part.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for part in parts)
        return query, key, value

    def _weights(self, query: Tensor, key: Tensor) -> Tensor:
        return (query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)).softmax(-1)

    def _of_positions(self, weights: Tensor) -> Tensor:
        return weights[..., self.num_queries :] if self.keys_include_query else weights

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return (
            f"{self.dim}, num_heads={self.num_heads}, num_queries={self.num_queries}, "
            f"keys_include_query={self.keys_include_query}"
        )


class ClassAttentionHead(nn.Module):
    """A classifier of what `LearnedAggregation` gathers: ``logits = W LN(c) + b``.

    With `per_class` every class has a query of its own, whose keys are the positions alone, and its logit is read from
    its own token: a map for each class. Costs ``K N dim`` instead of ``N dim`` multiply-adds for the weights.

    Source: Touvron et al. (2021, arXiv 2112.13692).

    Args:
        dim: channels of the aggregation.
        num_classes: of the logits, at least 1.
        per_class: one query for each class.
        in_features: channels of the features if they are others, as for the last stage of a pyramid; a linear layer
            brings them to `dim`.
        num_heads, mlp_ratio, qkv_bias, layer_scale, drop_path: see `LearnedAggregation`.

    Raises:
        InputError: a number outside its range.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        per_class: bool = False,
        in_features: int | None = None,
        num_heads: int = 1,
        mlp_ratio: float = 3.0,
        qkv_bias: bool = True,
        layer_scale: float = 1e-4,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        _check_classes(num_classes)
        if in_features is not None and in_features < 1:
            raise InputError(f"in_features: got {in_features}, expected at least 1")
        self.per_class = per_class
        self.aggregation = LearnedAggregation(
            dim, num_heads, mlp_ratio, qkv_bias, layer_scale, drop_path, num_classes if per_class else 1, not per_class
        )
        self.proj: nn.Module = nn.Identity() if in_features is None else nn.Linear(in_features, dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.fc = nn.Linear(dim, num_classes)
        for layer in (self.proj, self.fc):
            _start_(layer)

    def forward(self, features: Tensor, *, return_attention: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Logits ``(batch, num_classes)``, with `return_attention` also the weights; see `LearnedAggregation`.

        Args:
            features: ``(batch, channels, height, width)`` or ``(batch, N, channels)``.

        Raises:
            InputError, TypeError: see `LearnedAggregation`.
        """
        if isinstance(self.proj, nn.Linear):
            _check_features(features, self.proj.in_features)
            channels = 1 if features.dim() == 4 else 2
            features = self.proj(features.movedim(channels, -1)).movedim(-1, channels)
        if return_attention:
            tokens, weights = self.aggregation(features, return_attention=True)
            return self._logits(tokens), weights
        return self._logits(self.aggregation(features))

    def _logits(self, tokens: Tensor) -> Tensor:
        tokens = self.norm(tokens)
        if self.per_class:
            return (tokens * self.fc.weight).sum(-1) + self.fc.bias
        logits: Tensor = self.fc(tokens[:, 0])
        return logits

    def reset_classifier_(self, num_classes: int) -> None:
        """Put a new classifier of `num_classes` classes, and new queries where each class has one; the rest stays.

        Raises:
            InputError: fewer than one class.
        """
        _check_classes(num_classes)
        new = nn.Linear(self.aggregation.dim, num_classes).to(self.fc.weight)
        self.fc = new.train(self.training)
        _start_(self.fc)
        if self.per_class:
            self.aggregation.reset_queries_(num_classes)


def _check_classes(num_classes: int) -> None:
    if num_classes < 1:
        raise InputError(f"num_classes: got {num_classes}, expected at least 1")


def _check_features(x: Tensor, dim: int) -> None:
    if not x.is_floating_point():
        raise TypeError(f"x: got {x.dtype}, expected floating-point numbers; convert and scale them first")
    channels = 1 if x.dim() == 4 else -1
    if x.dim() not in (3, 4) or x.shape[channels] != dim or not min(x.shape[1:]):
        raise InputError(
            f"x: got shape {tuple(x.shape)}, expected (batch, positions, {dim}) or (batch, {dim}, height, width) with "
            f"{dim} channels and at least one position"
        )


def _start_(layer: nn.Module) -> None:
    """Truncated normal with deviation 0.02, zero bias."""
    if isinstance(layer, nn.Linear):
        nn.init.trunc_normal_(layer.weight, std=0.02)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
