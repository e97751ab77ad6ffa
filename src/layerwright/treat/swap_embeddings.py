"""Compute the token embeddings of an encoder from the tokens' spelling (Cohn et al., 2023, EELBERT)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from layerwright.core.errors import InputError
from layerwright.core.layers import parameter_bytes, structure_copy
from layerwright.nn.ngram_embedding import NGramHashEmbedding, vocabulary_of
from layerwright.nn.ties import sharing_names, untie_

__all__ = ["SizeReport", "size_report", "swap_embeddings"]

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class SizeReport:
    """Bytes of a model by what they are for.

    Attributes:
        total_bytes: of all saved tensors, shared ones once.
        table_bytes: of the token table.
        head_bytes: of an output projection to the vocabulary that has a weight of its own.
        vocabulary_bytes: UTF-8 of the strings that a computed embedding needs; tokenizers hold them anyway.
    """

    total_bytes: int
    table_bytes: int
    head_bytes: int
    vocabulary_bytes: int

    @property
    def without_table_bytes(self) -> int:
        """All saved tensors but the token table."""
        return self.total_bytes - self.table_bytes

    @property
    def encoder_bytes(self) -> int:
        """All saved tensors but the token table and the output projection."""
        return self.without_table_bytes - self.head_bytes


def swap_embeddings(
    model: M, tokenizer: Sequence[str] | Any, *, untie: bool = False, std: float | None = None, **settings: Any
) -> M:
    """A copy of the encoder `model` that computes its token embeddings (`NGramHashEmbedding`); it shares what stays.

    Positions, segments, norm and dropout behind it stay and are trained. The model was trained with other vectors, so
    its outputs are worth nothing until it is trained again. ``lw.save`` and ``lw.load`` keep it, with the strings.

    Args:
        model: a transformers encoder, or any model with ``get_input_embeddings`` and ``set_input_embeddings``.
        tokenizer: with ``get_vocab()``, or a list of the strings of all ids. Rows of the table beyond its last id are
            not needed.
        untie: give an output projection that shares the table (``tie_word_embeddings``) a weight of its own.
        std: deviation of the vectors; None for that of the table.
        settings: further arguments of `NGramHashEmbedding`.

    Raises:
        TypeError: no table to swap.
        InputError: the table is shared and `untie` is False, more strings than rows, a setting outside its range.
    """
    old = _input_table(model)
    path = next(name for name, module in model.named_modules() if module is old)
    vocabulary = vocabulary_of(tokenizer)
    if len(vocabulary) > old.num_embeddings:
        raise InputError(
            f"tokenizer: has {len(vocabulary)} strings, the table {old.num_embeddings} rows; it belongs to another model"
        )
    sharing = sharing_names(model, f"{path}.weight")
    if any(isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Embedding) for name in sharing):
        raise InputError(
            f"{path}: other embeddings share this table ({', '.join(sharing)}); only encoders can be swapped"
        )
    if sharing and not untie:
        raise InputError(
            f"{path}: {', '.join(sharing)} shares this table (tie_word_embeddings); pass untie=True to give it its own"
        )
    deviation = float(old.weight.detach().float().std()) if std is None else std
    new = NGramHashEmbedding(vocabulary, old.embedding_dim, std=deviation, **settings)
    if new.embedding_dim != old.embedding_dim:
        raise InputError(f"project_to: got {new.embedding_dim}, expected the width of the table, {old.embedding_dim}")
    return _with_embedding(model, path, new, sharing)


def size_report(model: nn.Module) -> SizeReport:
    """What the tensors of `model` take, with and without tables of the vocabulary's size.

    Raises:
        TypeError: a model without ``get_input_embeddings``.
    """
    table = _input_embedding(model)
    outer: Any = model
    head: Any = outer.get_output_embeddings() if hasattr(outer, "get_output_embeddings") else None
    weight = getattr(head, "weight", None)
    own = weight is not None and not (isinstance(table, nn.Embedding) and weight is table.weight)
    strings = table.vocabulary if isinstance(table, NGramHashEmbedding) else ()
    return SizeReport(
        parameter_bytes(model),
        parameter_bytes(table) if isinstance(table, nn.Embedding) else 0,
        parameter_bytes(head) if own else 0,
        sum(len(token.encode("utf-8", "surrogatepass")) for token in strings),
    )


def _with_embedding(model: M, path: str, new: NGramHashEmbedding, sharing: Sequence[str]) -> M:
    result = structure_copy(model)
    copied: Any = result.get_submodule(path)
    config: Any = getattr(result, "config", None)
    declared = getattr(result, "all_tied_weights_keys", None)
    gone = {f"{path}.weight", *sharing}
    if sharing and hasattr(config, "tie_word_embeddings"):
        config.tie_word_embeddings = False  # transformers then ties nothing at all, biases of heads included
        gone |= set(declared) if isinstance(declared, dict) else set()
    everything = dict(result.named_parameters(remove_duplicate=False))
    for name in sorted(gone & set(everything)):
        owner, _, attribute = name.rpartition(".")
        shared = everything[name]
        setattr(result.get_submodule(owner), attribute, nn.Parameter(shared.detach().clone(), shared.requires_grad))
    untie_(result, sorted(gone))
    changed: Any = result
    changed.set_input_embeddings(new.to(copied.weight.device, copied.weight.dtype).train(copied.training))
    return result


def _input_embedding(model: nn.Module) -> nn.Module:
    get: Any = getattr(model, "get_input_embeddings", None)
    if get is None:
        raise TypeError(f"model: {type(model).__name__} has no get_input_embeddings(); give a transformers encoder")
    found: nn.Module = get()
    return found


def _input_table(model: nn.Module) -> nn.Embedding:
    table = _input_embedding(model)
    if not isinstance(table, nn.Embedding):
        raise TypeError(f"model: its input embedding is a {type(table).__name__}, expected an nn.Embedding to swap")
    return table
