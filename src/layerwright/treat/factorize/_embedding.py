"""An embedding of lower rank: the best one, by singular values."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from layerwright.core.errors import InputError
from layerwright.nn.factorized_embedding import FactorizedEmbedding
from layerwright.nn.treated import owned

__all__ = ["factorize_embedding"]


@torch.no_grad()
def factorize_embedding(embedding: nn.Module, rank: int) -> FactorizedEmbedding:
    """The embedding ``(U_r S_r) V_r^T`` of rank `rank` that is closest to ``E = U S V^T``.

    The squared error of the whole table is the sum of the squares of the singular values that are left out. One that is
    factorized already is factorized again from its product, which is not formed. As in COST-EFF (Shen et al., 2022).

    Args:
        embedding: an ``nn.Embedding`` ``(tokens, hidden)`` or a `FactorizedEmbedding`; left as it is.
        rank: 1 to the hidden size, or to the present rank.

    Raises:
        TypeError: another kind of module.
        InputError: a rank outside that range, or an embedding that does more than look up rows.
    """
    if isinstance(embedding, FactorizedEmbedding):
        left, right = embedding.table.weight, embedding.projection.weight.T
        largest = embedding.rank
    elif isinstance(embedding, nn.Embedding):
        if type(embedding).forward is not nn.Embedding.forward or embedding.max_norm is not None:
            raise InputError(f"embedding: {type(embedding).__name__} does more than look up rows; leave it alone")
        left, right = embedding.weight, None
        largest = min(embedding.weight.shape)
    else:
        raise TypeError(f"embedding: got {type(embedding).__name__}, expected an nn.Embedding")
    if isinstance(rank, bool) or not 1 <= rank <= largest:
        raise InputError(f"rank: got {rank}, expected 1 to {largest}")
    first, second = _halves(left.float(), None if right is None else right.float(), rank)
    dtype, device = left.dtype, left.device
    with torch.device("meta"):
        new = FactorizedEmbedding(embedding.num_embeddings, embedding.embedding_dim, rank, embedding.padding_idx)
    trained = any(parameter.requires_grad for parameter in embedding.parameters())
    new.table.weight = nn.Parameter(owned(first, dtype, first.shape).to(device), trained)
    new.projection.weight = nn.Parameter(owned(second, dtype, second.shape).to(device), trained)
    return new.train(embedding.training)


def _halves(left: Tensor, right: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
    """``U_r S_r`` ``(tokens, rank)`` and ``V_r`` ``(hidden, rank)`` of `left`, or of ``left @ right``."""
    if right is None:
        u, s, vt = torch.linalg.svd(left, full_matrices=False)
    else:
        q, r = torch.linalg.qr(left)
        u, s, vt = torch.linalg.svd(r @ right, full_matrices=False)
        u = q @ u
    return u[:, :rank] * s[:rank], vt[:rank].T
