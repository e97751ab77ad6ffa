"""Small language models and encoders of transformers, and what they cost."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from layerwright.core.errors import InputError

__all__ = ["VOCABULARY", "flops_per_token", "parameter_counts", "swiglu_width", "tiny_bert", "tiny_llama"]

VOCABULARY = 256


def swiglu_width(dim: int) -> int:
    """The inner width of a gated feed-forward part: ``8 dim / 3`` rounded to a multiple of 16."""
    return 16 * max(1, round(8 * dim / 3 / 16))


def tiny_llama(
    dim: int = 64,
    layers: int = 4,
    heads: int = 4,
    *,
    kv_heads: int | None = None,
    ffn: int | None = None,
    context: int = 128,
    vocabulary: int = VOCABULARY,
    seed: int = 0,
    **settings: Any,
) -> Any:
    """A Llama (RMSNorm, RoPE, SwiGLU, tied embedding, deviation 0.02 at the start) without special tokens.

    Args:
        dim, layers, heads, kv_heads: hidden size, blocks, attention heads, key-value heads (all by default).
        ffn: inner width, `swiglu_width` by default.
        context: the longest input is at least this.
        seed: of the weights; the global generator is left alone.
        settings: further fields of ``LlamaConfig``.

    Raises:
        InputError: heads do not divide the width.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    if dim % heads:
        raise InputError(f"heads: got {heads} for a width of {dim}, expected a divisor")
    fields: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": dim,
        "intermediate_size": ffn or swiglu_width(dim),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads or heads,
        "max_position_embeddings": max(context, 512),
        "tie_word_embeddings": True,
        "attn_implementation": "sdpa",
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**(fields | settings)))


def tiny_bert(
    dim: int = 64,
    layers: int = 2,
    heads: int = 2,
    *,
    ffn: int | None = None,
    context: int = 128,
    vocabulary: int = VOCABULARY,
    labels: int | None = None,
    seed: int = 0,
    **settings: Any,
) -> Any:
    """A BERT encoder (post-norm): for masked language modelling, or with `labels` for classifying sequences."""
    from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

    fields: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": dim,
        "intermediate_size": ffn or 4 * dim,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": max(context, 128),
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    if labels is not None:
        fields["num_labels"] = labels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = BertConfig(**(fields | settings))
        return BertForMaskedLM(config) if labels is None else BertForSequenceClassification(config)


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """``total``, ``embedding`` and ``other`` parameters; what is shared counts once."""
    total = sum(parameter.numel() for parameter in model.parameters())
    tables = {id(m.weight): m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding)}
    return {"total": total, "embedding": sum(tables.values()), "other": total - sum(tables.values())}


def flops_per_token(model: Any, context: int) -> float:
    """Floating-point operations of a forward pass for each token of a causal model, a multiplication and addition as 2.

    ``2 (matrices outside embeddings) + 2 vocabulary dim + 2 layers context (heads head_dim)`` with the causal half of
    attention's two products; training takes three times that. Look-ups count nothing.
    """
    config = model.config
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head = model.get_output_embeddings()
    inside = {id(p): p.numel() for p in model.parameters() if p.dim() >= 2 and id(p) not in tables}
    if head is not None:
        inside.pop(id(head.weight), None)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 2 * config.num_hidden_layers * context * config.num_attention_heads * head_dim
    output = 0 if head is None else 2 * head.weight.numel()
    return float(2 * sum(inside.values()) + output + attention)
