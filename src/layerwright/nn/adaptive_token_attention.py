"""Attention that computes the rows of sampled tokens alone, and the transformer block around it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from layerwright.core.errors import InputError
from layerwright.nn.drop_path import DropPath
from layerwright.nn.token_sampler import inverse_transform_sample, token_significance

__all__ = [
    "ATSBlock",
    "AdaptiveTokenSampler",
    "Packing",
    "TokenSampling",
    "sample_rows",
    "split_heads",
]

Choose = Callable[[Tensor, int], tuple[Tensor, Tensor]]
_OFFICIAL_LEAST = 8
_KNOWN = {
    "mode": ("fixed", "random", "official"),
    "rule": ("inverse", "nearest"),
    "value_norm": ("concat", "per_head", "none"),
    "score_from": ("class_token", "mean_attention"),
}


@dataclass(frozen=True)
class TokenSampling:
    """How a layer chooses the tokens that go on.

    Attributes:
        max_tokens: points at which a layer samples: a whole number from 1, or a share in (0, 1] of the image's tokens. 1.0
            leaves the number to the scores, as published. In mode ``official`` there are at least 8.
        special: tokens in front that always stay and get no score: 1 for a class token.
        mode, rule: see `inverse_transform_sample`.
        value_norm: see `token_significance`.
        score_from: ``class_token`` reads the attention of the first token; ``mean_attention``, an extension for networks
            without one, the mean over the rows of all tokens, which costs as much as full attention.
        choose: ``choose(scores, points)`` in place of `inverse_transform_sample`, with its returns; to compare with.

    Raises:
        InputError: a value outside its range, or scores of a class token where there is none.
    """

    max_tokens: int | float = 1.0
    special: int = 1
    mode: Literal["fixed", "random", "official"] = "fixed"
    rule: Literal["inverse", "nearest"] = "inverse"
    value_norm: Literal["concat", "per_head", "none"] = "concat"
    score_from: Literal["class_token", "mean_attention"] = "class_token"
    choose: Choose | None = None

    def __post_init__(self) -> None:
        most = self.max_tokens
        if isinstance(most, bool) or not most > 0 or (isinstance(most, float) and most > 1):
            raise InputError(f"max_tokens: got {most}, expected a whole number from 1 or a share in (0, 1]")
        for name, known in _KNOWN.items():
            if (value := getattr(self, name)) not in known:
                raise InputError(f"{name}: got {value!r}, expected one of {', '.join(known)}")
        if self.special < 0 or (not self.special and self.score_from == "class_token"):
            raise InputError(
                f"special: got {self.special}, expected at least 1, the class token; without one take "
                "score_from='mean_attention'"
            )

    def points(self, tokens: int) -> int:
        """Points for an image of `tokens` tokens, special ones not counted."""
        share = isinstance(self.max_tokens, float)
        count = max(1, round(self.max_tokens * tokens)) if share else int(self.max_tokens)
        return max(count, min(_OFFICIAL_LEAST, tokens)) if self.mode == "official" else count


@torch.no_grad()
def sample_rows(
    sampling: TokenSampling,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    tokens: int,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The tokens of an attention layer that go on. No gradient passes the choice.

    Args:
        sampling: how to choose.
        query: ``(batch, heads, rows, head_dim)``: of the class token in front, or of all tokens for ``mean_attention``.
        key, value: of all tokens ``(batch, heads, all tokens, head_dim)``.
        mask: ``(batch, all tokens)``, true for those that are there; None for all.
        tokens: of an image before anything was dropped, special ones not counted; a share counts from there.
        scale: of the products; ``head_dim ** -0.5`` if left out.

    Returns:
        Positions ``(batch, most)`` in ascending order, special ones in front, and which of them are meant.
    """
    mean = sampling.score_from == "mean_attention"
    weights = (query if mean else query[:, :, :1]) @ key.transpose(2, 3)
    weights = weights.float() * (key.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        weights = weights.masked_fill(~mask[:, None, None, :], -torch.inf)
    weights = weights.softmax(-1)
    if mean:
        rows = torch.ones_like(weights[:, 0, :, 0]) if mask is None else mask.to(weights.dtype)
        weights = (weights * (rows / rows.sum(1, keepdim=True))[:, None, :, None]).sum(2, keepdim=True)
    scores = token_significance(weights, value, mask, sampling.value_norm, sampling.special)
    points = sampling.points(tokens)
    if sampling.choose:
        positions, there = sampling.choose(scores, points)
    else:
        positions, there = inverse_transform_sample(scores, points, sampling.mode, sampling.rule)
    front = torch.arange(sampling.special, device=positions.device).expand(len(positions), -1)
    kept = torch.cat([torch.ones_like(front, dtype=torch.bool), there], 1)
    return torch.cat([front, positions + sampling.special], 1), kept


class Packing:
    """Where the tokens of a padded batch stand; to lay them one after the other and back.

    Rows are moved whole by their numbers, which are found once.

    Args:
        mask: ``(batch, most)``, true for tokens; None where there is no padding.
    """

    def __init__(self, mask: Tensor | None = None) -> None:
        self.mask = mask
        if mask is not None:
            flat = mask.flatten()
            self.places = flat.nonzero()[:, 0]
            self.slots = flat.cumsum(0).sub_(1).clamp_min_(0)

    def pack(self, x: Tensor) -> Tensor:
        """``(batch, most, features)`` to the tokens of all images ``(tokens, features)``."""
        flat = x.flatten(0, 1)
        return flat if self.mask is None else flat.index_select(0, self.places)

    def pad(self, tokens: Tensor, batch: int, *, zeros: bool = True) -> Tensor:
        """``(batch, most, features)``; padding is zero, or without `zeros` any token, which spares a pass over memory."""
        if self.mask is None:
            return tokens.unflatten(0, (batch, -1))
        if zeros:
            flat = tokens.new_zeros(len(self.slots), tokens.shape[-1]).index_copy_(0, self.places, tokens)
        else:
            flat = tokens.index_select(0, self.slots)
        return flat.unflatten(0, (batch, -1))

    def rows(self, positions: Tensor, kept: Packing, most: int) -> Tensor:
        """Numbers among the packed tokens here of those that `kept` packs, at `positions` of a width of `most`."""
        batch = torch.arange(len(positions), device=positions.device)[:, None]
        flat = (positions + batch * most).flatten()
        if kept.mask is not None:
            flat = flat[kept.places]
        return flat if self.mask is None else self.slots[flat]


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """``(batch, tokens, heads * head_dim)`` to ``(batch, heads, tokens, head_dim)``."""
    return x.unflatten(2, (-1, head_dim)).transpose(1, 2)


class AdaptiveTokenSampler(nn.Module):
    """Self-attention whose output has the rows of sampled tokens alone; keys and values are those of all tokens.

    It has the parameters of plain attention, and images that need few tokens get few. Source: Fayyaz et al., "Adaptive Token
    Sampling For Efficient Vision Transformers" (2022, arXiv 2111.15667).

    Args:
        dim: features of a token.
        num_heads: divides `dim`.
        sampling: how tokens are chosen; None keeps all, which is plain attention.
        qkv_bias: of queries, keys and values.

    Raises:
        InputError: heads that do not divide `dim`.
    """

    def __init__(
        self, dim: int, num_heads: int, sampling: TokenSampling | None = TokenSampling(), qkv_bias: bool = True
    ) -> None:
        super().__init__()
        if dim < 1 or num_heads < 1 or dim % num_heads:
            raise InputError(f"num_heads: got {num_heads} for dim = {dim}, expected a divisor of it")
        self.head_dim, self.sampling = dim // num_heads, sampling
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=qkv_bias), nn.Linear(dim, dim)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, tokens: int | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Packed output rows ``(kept of all images, dim)``, their positions and the mask of what was kept.

        Args:
            x: ``(batch, all tokens, dim)``, special ones in front.
            mask: ``(batch, all tokens)``, true for those that are there; None for all.
            tokens: of an image before any was dropped, special ones not counted; those of `x` if left out.

        Returns:
            The rows; positions ``(batch, most kept)``, None if nothing is sampled; their mask, None if all are meant.

        Raises:
            InputError: no token but special ones, or a mask of another shape.
        """
        special = self.sampling.special if self.sampling else 0
        if x.dim() != 3 or x.shape[2] != self.proj.in_features or x.shape[1] <= special or not len(x):
            raise InputError(
                f"x: got shape {tuple(x.shape)}, expected (batch, tokens, {self.proj.in_features}) with more than {special} "
                "tokens"
            )
        if mask is not None and mask.shape != x.shape[:2]:
            raise InputError(f"mask: got shape {tuple(mask.shape)}, expected {tuple(x.shape[:2])}")
        before = Packing(mask)
        query, key, value = (
            split_heads(part, self.head_dim)
            for part in before.pad(self.qkv(before.pack(x)), len(x), zeros=False).chunk(3, -1)
        )
        rows, kept = None, mask
        if self.sampling:
            rows, kept = sample_rows(self.sampling, query, key, value, mask, tokens or x.shape[1] - special)
            query = query.gather(2, rows[:, None, :, None].expand(-1, query.shape[1], -1, self.head_dim))
        seen = functional.scaled_dot_product_attention(query, key, value, _columns(mask))
        return self.proj(Packing(kept).pack(seen.transpose(1, 2).flatten(2))), rows, kept


class ATSBlock(nn.Module):
    """A transformer block, norms first, that hands on the sampled tokens alone; see `AdaptiveTokenSampler`.

    No linear layer sees the padding between images of different counts.

    Args:
        dim, num_heads, sampling, qkv_bias: see `AdaptiveTokenSampler`.
        mlp_ratio: hidden features over `dim`.
        drop_path: probability that an image loses a branch in training mode, in [0, 1).

    Raises:
        InputError: a value outside its range.
    """

    def __init__(
        self, dim: int, num_heads: int, sampling: TokenSampling | None = TokenSampling(), mlp_ratio: float = 4.0,
        qkv_bias: bool = True, drop_path: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = AdaptiveTokenSampler(dim, num_heads, sampling, qkv_bias)
        hidden = int(mlp_ratio * dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, mask: Tensor | None = None, tokens: int | None = None) -> tuple[Tensor, Tensor | None]:
        """Tokens ``(batch, all, dim)`` to those that go on ``(batch, most kept, dim)``, zeros for padding, and their mask.

        Args and errors as for `AdaptiveTokenSampler.forward`.
        """
        out, rows, kept = self.attn(self.norm1(x), mask, tokens)
        if rows is not None:
            x = x.gather(1, rows[:, :, None].expand(-1, -1, x.shape[2]))
        batch, after = len(x), Packing(kept)
        x = x + self.drop_path(after.pad(out, batch))
        x = x + self.drop_path(after.pad(self.mlp(self.norm2(after.pack(x))), batch))
        return x if kept is None else x * kept[:, :, None], kept

    def extra_repr(self) -> str:
        """The sampling."""
        return str(self.attn.sampling)


def _columns(mask: Tensor | None) -> Any:
    return None if mask is None else mask[:, None, None, :]
