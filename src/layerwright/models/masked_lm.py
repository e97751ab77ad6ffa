"""Masked language models of any depth and width, by transformers' BERT, and the masking of their training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from layerwright.core.errors import InputError
from layerwright.models._vit_blocks import checked_heads

__all__ = ["IGNORED", "bert_mask", "masked_lm", "masked_lm_loss"]

IGNORED = -100
"""Label of a position that does not count."""


def masked_lm(
    dim: int,
    depth: int,
    heads: int,
    *,
    vocabulary: int = 257,
    max_len: int = 128,
    ffn_dim: int | None = None,
    dropout: float = 0.0,
    seed: int = 0,
    **fields: Any,
) -> Any:
    """An untrained ``BertForMaskedLM``: deviation 0.02 at the start, norms after the parts, as BERT has them.

    Source: Devlin et al., 2019, arXiv 1810.04805; deeper and narrower at equal parameters: Xue et al., 2022, arXiv
    2205.10505.

    Args:
        dim, depth, heads: features of a token, blocks, heads of each; `heads` divides `dim`.
        vocabulary: tokens, the mask token among them (bytes and one more by default).
        max_len: the longest sequence.
        ffn_dim: width of the feed-forward parts, ``4 dim`` by default.
        dropout: everywhere.
        seed: of the weights; the global generator is left alone.
        fields: further fields of ``BertConfig``.

    Raises:
        InputError: a number outside its range.
    """
    from transformers import BertConfig, BertForMaskedLM

    checked_heads(dim, heads)
    for name, value in (("depth", depth), ("vocabulary", vocabulary), ("max_len", max_len)):
        if value < 1:
            raise InputError(f"{name}: got {value}, expected at least 1")
    shape: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": dim,
        "intermediate_size": ffn_dim or 4 * dim,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "max_position_embeddings": max_len,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
        "type_vocab_size": 1,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BertForMaskedLM(BertConfig(**(shape | fields)))


def bert_mask(
    ids: Tensor, mask_id: int, *, vocabulary: int, ratio: float = 0.15, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Choose a share of the tokens to predict; of these 80 % become `mask_id`, 10 % another token, 10 % stay.

    Each sequence has exactly ``max(1, round(tokens ratio))`` chosen ones. Source: Devlin et al., 2019, arXiv 1810.04805.

    Args:
        ids: ``(batch, tokens)``.
        mask_id: the mask token.
        vocabulary: random tokens are drawn from ``range(vocabulary)``, so leave special ones out.
        ratio: inside (0, 1).
        generator: of the choice.

    Returns:
        What the model reads, and labels: the token where it was chosen, -100 elsewhere. Both ``(batch, tokens)``.

    Raises:
        InputError: a ratio outside (0, 1), or fewer than 2 tokens.
    """
    if not 0 < ratio < 1:
        raise InputError(f"mask_ratio: got {ratio}, expected a share inside (0, 1)")
    if ids.dim() != 2 or ids.shape[1] < 2:
        raise InputError(f"ids: got shape {tuple(ids.shape)}, expected (batch, 2 or more tokens)")
    count = max(1, round(ids.shape[1] * ratio))
    place = torch.rand(ids.shape, generator=generator).argsort(1).argsort(1).to(ids.device)
    chosen = place < count
    fate = torch.rand(ids.shape, generator=generator).to(ids.device)
    other = torch.randint(vocabulary, ids.shape, generator=generator).to(ids.device)
    read = torch.where(chosen & (fate < 0.8), torch.full_like(ids, mask_id), ids)
    read = torch.where(chosen & (fate >= 0.9), other, read)
    return read, torch.where(chosen, ids, torch.full_like(ids, IGNORED))


def masked_lm_loss(model: nn.Module, read: Tensor, labels: Tensor) -> Tensor:
    """Mean nats of the chosen tokens."""
    logits: Tensor = model(input_ids=read).logits
    chosen = labels != IGNORED
    return nn.functional.cross_entropy(logits[chosen].float(), labels[chosen])
