"""Fit an affine map from hashed spellings to a table that was trained: a computed embedding to start from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from layerwright.core.errors import InputError
from layerwright.nn.ngram_embedding import NGramHashEmbedding, vocabulary_of

__all__ = ["distill_embeddings"]


@torch.no_grad()
def distill_embeddings(
    table: nn.Embedding, vocabulary: Sequence[str] | Any, dim: int, **settings: Any
) -> tuple[NGramHashEmbedding, float]:
    """An `NGramHashEmbedding` of `dim` components with an affine map that comes closest to `table`, by least squares.

    An extension of EELBERT, which trains the encoder on hashes as they are. It holds ``(dim + 1) * hidden`` numbers.
    How much of a table follows from spelling is what the second result says; it rises with `dim`.

    Args:
        table: ``(tokens, hidden)``, left as it is.
        vocabulary: string of each row, or a tokenizer.
        dim: components before the map, at most ``tokens - 1``.
        settings: further arguments of `NGramHashEmbedding`.

    Returns:
        The embedding, and the share of the table's variance over tokens that it reaches (R^2), 0 to 1.

    Raises:
        TypeError: no ``nn.Embedding``.
        InputError: strings and rows differ in number, or a `dim` outside its range.
    """
    if not isinstance(table, nn.Embedding):
        raise TypeError(f"table: got {type(table).__name__}, expected an nn.Embedding")
    strings = vocabulary_of(vocabulary)
    if len(strings) != table.num_embeddings:
        raise InputError(
            f"vocabulary: got {len(strings)} strings, expected one for each of {table.num_embeddings} rows"
        )
    if not 1 <= dim < len(strings):
        raise InputError(f"dim: got {dim}, expected 1 to {len(strings) - 1}: fewer than the table has rows")
    hashed = NGramHashEmbedding(strings, dim, **settings)
    wanted = table.weight.detach().double().cpu()
    features = hashed.weight.double()
    centre, mean = features.mean(0), wanted.mean(0)
    solution = torch.linalg.lstsq(features - centre, wanted - mean, driver="gelsd").solution
    left = wanted - mean - (features - centre) @ solution
    fitted = NGramHashEmbedding(strings, dim, project_to=table.embedding_dim, **settings)
    assert fitted.projection is not None and fitted.projection.bias is not None
    fitted.projection.weight.copy_(solution.T)
    fitted.projection.bias.copy_(mean - centre @ solution)
    share = 1 - float(left.square().sum() / (wanted - mean).square().sum().clamp_min(1e-300))
    return fitted.to(table.weight.device, table.weight.dtype).train(table.training), share
