"""An embedding table as a product of a narrow one and a linear map."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from torch import Tensor, nn

from layerwright.nn.treated import dtype_name, named_dtype

__all__ = ["FactorizedEmbedding"]


class FactorizedEmbedding(nn.Module):
    """Rows of ``E1`` ``(tokens, rank)`` times ``E2`` ``(rank, hidden)``, in the place of an ``nn.Embedding``.

    It holds ``rank * (tokens + hidden)`` numbers. As in ALBERT (Lan et al., 2020) and COST-EFF (Shen et al., 2022).

    Args:
        tokens: rows of the table.
        hidden_size: features of a row.
        rank: of the product.
        padding_idx: row that gets no gradient, as in ``nn.Embedding``.
    """

    def __init__(self, tokens: int, hidden_size: int, rank: int, padding_idx: int | None = None) -> None:
        super().__init__()
        self.table = nn.Embedding(tokens, rank, padding_idx=padding_idx)
        self.projection = nn.Linear(rank, hidden_size, bias=False)

    @property
    def num_embeddings(self) -> int:
        """Rows of the table."""
        return self.table.num_embeddings

    @property
    def embedding_dim(self) -> int:
        """Features of a row."""
        return self.projection.out_features

    @property
    def rank(self) -> int:
        """Rank of the product."""
        return self.table.embedding_dim

    @property
    def padding_idx(self) -> int | None:
        """Row that gets no gradient."""
        return self.table.padding_idx

    @property
    def weight(self) -> Tensor:
        """The product ``(tokens, hidden)``, made anew each time."""
        return self.table.weight @ self.projection.weight.T

    def forward(self, ids: Tensor) -> Tensor:
        """Rows ``(..., hidden)`` of integers ``(...)``."""
        rows: Tensor = self.projection(self.table(ids))
        return rows

    def spec(self) -> dict[str, Any]:
        """Plain data from which `empty` builds the same form."""
        return {
            "type": "factorized_embedding",
            "tokens": self.num_embeddings,
            "hidden_size": self.embedding_dim,
            "rank": self.rank,
            "padding_idx": self.padding_idx,
            "dtype": dtype_name(self.table.weight.dtype),
        }

    @classmethod
    def empty(cls, spec: Mapping[str, Any]) -> Self:
        """A module of that form with uninitialised tensors."""
        module = cls(spec["tokens"], spec["hidden_size"], spec["rank"], spec["padding_idx"])
        return module.to(named_dtype(spec["dtype"]))

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{self.num_embeddings}, {self.embedding_dim}, rank={self.rank}"
