"""Layers that use the treated weight of another layer, as a head uses its embedding's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from layerwright.core.errors import InputError
from layerwright.nn.low_rank import LowRankLinear
from layerwright.nn.quantized import QuantEmbedding
from layerwright.nn.treated import TreatedLinear, dtype_name, named_dtype

__all__ = ["Source", "TiedEmbedding", "TiedLinear"]

Source = TreatedLinear | QuantEmbedding | LowRankLinear


class Tied(nn.Module):
    """A layer without a weight of its own. The other layer is no submodule: it is saved and moved where it stands.

    `to` is that layer's path in the model; `link` sets the layer.
    """

    def __init__(self, to: str) -> None:
        super().__init__()
        self.to_path = to
        self._source: list[Source] = []

    def link(self, source: nn.Module) -> None:
        """Use the weight of `source`."""
        if not isinstance(source, Source):
            raise InputError(
                f"{self.to_path}: {type(source).__name__} has no treated weight that another layer could use"
            )
        self._source = [source]

    @property
    def source(self) -> Source:
        """The layer whose weight it uses."""
        if not self._source:
            raise InputError(f"this layer shares the weight of {self.to_path}: link that layer first (rebuild_ does)")
        return self._source[0]

    @property
    def weight(self) -> Tensor:
        """The weight of the other layer."""
        return self.source.weight

    def extra_repr(self) -> str:
        """Whose weight it uses."""
        return f"to={self.to_path}"


class TiedLinear(Tied):
    """``x @ W.T + bias`` with the weight of another layer and a bias of its own."""

    bias: Tensor | None

    def __init__(self, to: str, bias: Tensor | None) -> None:
        super().__init__(to)
        self.register_buffer("bias", bias)

    @classmethod
    def empty(cls, spec: Mapping[str, Any]) -> TiedLinear:
        """A layer of that form, not linked, with an uninitialised bias."""
        size = spec["bias"]
        return cls(spec["to"], None if size is None else torch.empty(size, dtype=named_dtype(spec["dtype"])))

    def spec(self) -> dict[str, Any]:
        """Plain data from which `empty` builds the same form."""
        bias = self.bias
        size, name = (None, None) if bias is None else (bias.numel(), dtype_name(bias.dtype))
        return {"type": "tied_linear", "to": self.to_path, "bias": size, "dtype": name}

    def logical_parameters(self) -> int:
        """Its bias: the weight counts where it stands."""
        return 0 if self.bias is None else self.bias.numel()

    @property
    def in_features(self) -> int:
        """Size of the input."""
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        """Size of the output."""
        return self.weight.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """`x` is ``(..., in_features)``."""
        return self.source.linear(x, self.bias)


class TiedEmbedding(Tied):
    """Rows of another embedding's table, times its own `multiplier`."""

    def __init__(self, to: str, padding_idx: int | None = None, multiplier: float = 1.0) -> None:
        super().__init__(to)
        self.padding_idx, self.multiplier = padding_idx, multiplier

    @classmethod
    def empty(cls, spec: Mapping[str, Any]) -> TiedEmbedding:
        """A layer of that form, not linked."""
        return cls(spec["to"], spec["padding_idx"], spec["multiplier"])

    def spec(self) -> dict[str, Any]:
        """Plain data from which `empty` builds the same form."""
        return {
            "type": "tied_embedding",
            "to": self.to_path,
            "padding_idx": self.padding_idx,
            "multiplier": self.multiplier,
        }

    @property
    def num_embeddings(self) -> int:
        """Rows of the table."""
        return self.weight.shape[0]

    @property
    def embedding_dim(self) -> int:
        """Columns of the table."""
        return self.weight.shape[1]

    def forward(self, ids: Tensor) -> Tensor:
        """Rows ``(..., embedding_dim)`` for whole numbers `ids` of any shape."""
        source = self.source
        if not isinstance(source, QuantEmbedding):
            raise InputError(f"{self.to_path}: a {type(source).__name__} has no rows to look up")
        return source.look_up(ids, self.multiplier)
