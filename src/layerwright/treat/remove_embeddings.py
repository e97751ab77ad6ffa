"""Take the embedding matrices out of a byte model (Shaham & Levy, 2021)."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from layerwright.core.blocks import find_blocks
from layerwright.core.errors import InputError
from layerwright.core.layers import structure_copy
from layerwright.nn.one_hot import OneHotEmbedding, OneHotHead
from layerwright.nn.ties import sharing_names, untie_

__all__ = ["remove_embeddings"]

M = TypeVar("M", bound=nn.Module)


def remove_embeddings(model: M) -> M:
    """A copy of `model` whose tokens are one-hot vectors and whose logits are features; it shares what stays.

    A `ByteSeq2Seq` loses its tables, the dropout on its encoder's input and that on the residual branches of its last
    decoder layer. Of a causal transformers model with ``get_input_embeddings`` and ``get_output_embeddings`` the table
    and the head go, and the dropout on the residual branches of the last block. Trained further, or from the start: as
    it comes out, the rest was trained with other vectors. Shaham & Levy, 2021, arXiv 2008.09396.

    Raises:
        TypeError: no table of tokens, or no head without a bias.
        InputError: fewer features than tokens, a table of another width than the head reads, or none left to remove.
    """
    own: Any = getattr(model, "without_embeddings", None)
    if own is not None:
        result: M = own()
        return result
    table, head = _parts(model)
    path = next(name for name, module in model.named_modules() if module is table)
    head_path = next(name for name, module in model.named_modules() if module is head)
    if table.embedding_dim != head.in_features or table.num_embeddings != head.out_features:
        raise InputError(
            f"{path}: a table {tuple(table.weight.shape)} and a head {tuple(head.weight.shape)} are not of one shape"
        )
    embedding = OneHotEmbedding(table.num_embeddings, table.embedding_dim, table.padding_idx, output_scale=None)
    logits = OneHotHead(head.out_features, head.in_features, table.padding_idx)
    changed: Any = structure_copy(model)
    gone = {f"{path}.weight", f"{head_path}.weight", *sharing_names(model, f"{path}.weight")}
    untie_(changed, sorted(gone))
    like = table.weight
    changed.set_input_embeddings(embedding.to(like.device, like.dtype).train(table.training))
    changed.set_output_embeddings(logits.to(like.device, like.dtype).train(head.training))
    if hasattr(changed.config, "tie_word_embeddings"):
        changed.config.tie_word_embeddings = False
    for name, module in find_blocks(changed)[-1].modules(changed)[-1].named_modules():
        if isinstance(module, nn.Dropout) and "attn_dropout" not in name and "attention_dropout" not in name:
            module.p = 0.0
    result = changed
    return result


def _parts(model: nn.Module) -> tuple[nn.Embedding, nn.Linear]:
    outer: Any = model
    if not hasattr(model, "get_input_embeddings") or not hasattr(model, "set_output_embeddings"):
        raise TypeError(
            f"model: {type(model).__name__} has no tables to remove; expected a ByteSeq2Seq or a causal transformers model"
        )
    table, head = outer.get_input_embeddings(), outer.get_output_embeddings()
    if not isinstance(table, nn.Embedding):
        raise TypeError(f"model: its input embedding is a {type(table).__name__}, expected an nn.Embedding to remove")
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise TypeError(f"model: its head is a {type(head).__name__}, expected a linear layer without a bias")
    return table, head
