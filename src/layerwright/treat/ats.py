"""Adaptive token sampling in trained vision transformers: no new parameters, and as many tokens as an image needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from layerwright.core.blocks import find_blocks
from layerwright.core.class_swap import swap_class_, swapped
from layerwright.core.errors import InputError
from layerwright.core.layers import structure_copy
from layerwright.nn.adaptive_token_attention import Packing, TokenSampling, sample_rows, split_heads

__all__ = ["apply_ats", "tokens_to_flops"]

_PARTS = ("layernorm_before", "attention", "layernorm_after", "mlp", "dropout")
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass
class _Run:
    """What the layers of a model tell one another while it runs: which positions of a padded batch are tokens."""

    packing: Packing = field(default_factory=Packing)
    tokens: int = 0
    counts: list[Tensor] = field(default_factory=list)


def apply_ats(
    model: nn.Module,
    layers: Sequence[int] | None = None,
    max_tokens: int | float = 1.0,
    **sampling: Any,
) -> nn.Module:
    """A ViT or DeiT whose attention drops tokens that the class token does not look at, image by image.

    In each of `layers` all tokens serve as keys and values, and those that are sampled go on: only their queries, output
    projections and feed-forward parts are computed, and none of the padding between images goes through a linear layer. The
    class token (and DeiT's distillation token) always stays. The result shares its tensors with `model`, which is left as it
    is; it can be run as it is or trained. After each pass ``last_token_counts`` holds the tokens kept by each of `layers`,
    ``(batch,)``, special ones not counted. Source: Fayyaz et al., 2022, Adaptive Token Sampling For Efficient Vision
    Transformers, arXiv 2111.15667.

    The weights of the class token's attention are computed here, so that any attention implementation will do; other rows
    run through PyTorch's own. Heads and hidden states keep their shapes up to the number of tokens, and ``output_attentions``
    gives nothing for these layers.

    Args:
        model: transformers' ViT or DeiT, bare or with a head, or a model with such blocks and no class token.
        layers: numbers from 0; from 3 on if left out, as published.
        max_tokens: points at which a layer samples: a whole number, or a share in (0, 1] of the image's tokens. 1.0 leaves the
            number to the scores, as published.
        sampling: what else `TokenSampling` takes, such as ``mode`` and ``rule``; a model without a class token needs
            ``score_from="mean_attention"``.

    Raises:
        TypeError: the model is no such transformer.
        InputError: a number outside its range, an unknown mode, or a model that was treated before.
    """
    if unknown := sampling.keys() - {each.name for each in fields(TokenSampling)} | sampling.keys() & {"special"}:
        raise InputError(f"{min(unknown)}: unknown; expected mode, rule, value_norm, score_from or choose")
    asked = TokenSampling(max_tokens, **sampling)
    names, special = _vision_blocks(model, class_token=asked.score_from == "class_token")
    depth = len(names)
    chosen = list(range(min(3, depth - 1), depth)) if layers is None else sorted(set(layers))
    if not chosen or chosen[0] < 0 or chosen[-1] >= depth:
        raise InputError(f"layers: got {list(layers or [])}, expected numbers from 0 to {depth - 1}")
    copy: Any = structure_copy(model)
    run = _Run()
    for number in range(chosen[0], depth):
        layer: Any = copy.get_submodule(names[number])
        if swapped(layer):
            raise InputError(f"model: {names[number]} was changed already; treat the model that it was made of")
        swap_class_(layer, _SampledLayer)
        layer.sampling = replace(asked, special=special) if number in chosen else None
        layer.starts_sampling = number == chosen[0]
        layer.sampling_run = run
    copy.last_token_counts = run.counts
    result: nn.Module = copy
    return result


def tokens_to_flops(
    counts: Sequence[int], dim: int, mlp_ratio: float = 4.0, dropped_at: Sequence[int] | None = None
) -> float:
    """Multiply-adds of the blocks for one image.

    ``(2 n + 2 m) dim^2 + 2 n m dim + 2 mlp_ratio m dim^2`` for a block that gets `n` tokens and hands on `m`: keys and values of
    all, the rest of those that go on, and the class token's weights twice where tokens are dropped.

    Args:
        counts: tokens that go into each block, special ones counted, and at last those that leave the last block.
        dim: hidden size.
        mlp_ratio: inner over hidden size.
        dropped_at: blocks that compute the weights of the class token apart, ``n dim`` each; those where the count falls if left out.

    Raises:
        InputError: fewer than two counts, or a number below 1.
    """
    if len(counts) < 2 or min(counts) < 1 or dim < 1 or not mlp_ratio > 0:
        raise InputError(
            f"counts, dim, mlp_ratio: got {list(counts)}, {dim} and {mlp_ratio}; expected two or more counts, all from 1"
        )
    steps = list(pairwise(counts))
    apart = [block for block, (n, m) in enumerate(steps) if m < n] if dropped_at is None else dropped_at
    blocks = sum((2 * n + 2 * m) * dim**2 + 2 * n * m * dim + 2 * mlp_ratio * m * dim**2 for n, m in steps)
    return blocks + sum(steps[block][0] * dim for block in apart)


def _vision_blocks(model: nn.Module, class_token: bool) -> tuple[list[str], int]:
    """Names of the blocks, and the number of special tokens in front."""
    embeddings: list[Any] = [module for module in model.modules() if hasattr(module, "cls_token")]
    found = find_blocks(model) if embeddings or not class_token else []
    stacks = [stack for stack in found if _fits(model.get_submodule(stack.names[0]))]
    if len(stacks) != 1:
        raise TypeError(
            f"model: got {type(model).__name__}, expected transformers' ViT or DeiT, which have a class token and one stack of "
            f"blocks with {', '.join(_PARTS)}; without a class token take score_from='mean_attention'"
        )
    special = 1 + (getattr(embeddings[0], "distillation_token", None) is not None) if embeddings else 0
    return list(stacks[0].names), special


def _fits(layer: Any) -> bool:
    return all(hasattr(layer, part) for part in _PARTS) and all(
        hasattr(layer.attention, part) for part in (*_PROJECTIONS, "head_dim", "scaling")
    )


class _SampledLayer(nn.Module):
    """Stands in front of the class of a ViT layer; see `apply_ats`."""

    sampling: TokenSampling | None
    starts_sampling: bool
    sampling_run: _Run
    attention: Any
    layernorm_before: nn.Module
    layernorm_after: nn.Module
    mlp: nn.Module
    dropout: nn.Module

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Tensor:
        """Padded tokens ``(batch, tokens, dim)`` to ``(batch, most kept, dim)``."""
        if attention_mask is not None:
            raise InputError("attention_mask: sampled layers keep masks of their own; leave it out")
        run, owner, batch = self.sampling_run, self.attention, len(hidden_states)
        if not batch:
            raise InputError("pixel_values: got an empty batch, expected at least one image")
        if self.starts_sampling and self.sampling:
            run.packing, run.tokens = Packing(), hidden_states.shape[1] - self.sampling.special
            run.counts.clear()
        before = run.packing
        tokens = before.pack(hidden_states)
        normed = self.layernorm_before(tokens)
        # What stands in the padding does not matter: it is masked.
        key, value = (
            split_heads(before.pad(project(normed), batch, zeros=False), owner.head_dim)
            for project in (owner.k_proj, owner.v_proj)
        )
        after = before
        if self.sampling:
            rows, there = self._sample(self.sampling, self._read(before, normed, batch), key, value)
            run.counts.append(there.sum(1) - self.sampling.special)
            after = Packing(None if bool(there.all()) else there)
            chosen = before.rows(rows, after, hidden_states.shape[1])
            tokens, normed = tokens.index_select(0, chosen), normed.index_select(0, chosen)
        query = split_heads(after.pad(owner.q_proj(normed), batch, zeros=False), owner.head_dim)
        seen = functional.scaled_dot_product_attention(
            query, key, value, None if before.mask is None else before.mask[:, None, None, :], scale=owner.scaling,
            dropout_p=owner.attention_dropout if self.training else 0.0,
        )  # fmt: skip
        out = tokens + self.dropout(owner.o_proj(after.pack(seen.transpose(1, 2).flatten(2))))
        out = out + self.dropout(self.mlp(self.layernorm_after(out)))
        run.packing = after
        return after.pad(out, batch)

    def _read(self, packing: Packing, normed: Tensor, batch: int) -> Tensor:
        """The tokens whose attention gives the scores ``(batch, 1 or all, dim)``."""
        if self.sampling and self.sampling.score_from == "mean_attention":
            return packing.pad(normed, batch, zeros=False)
        if packing.mask is None:
            return normed.unflatten(0, (batch, -1))[:, :1]
        starts = packing.slots.unflatten(0, (batch, -1))[:, 0]
        return normed.index_select(0, starts)[:, None]

    @torch.no_grad()
    def _sample(self, sampling: TokenSampling, normed: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Rows that go on ``(batch, most)`` and which of them are tokens."""
        owner, run = self.attention, self.sampling_run
        query = split_heads(owner.q_proj(normed), owner.head_dim)
        return sample_rows(sampling, query, key, value, run.packing.mask, run.tokens, owner.scaling)
