"""Attention that knows where it was (Chorowski et al., 2015, arXiv 1506.07503), as Tacotron 2 uses it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["LocationSensitiveAttention"]


class LocationSensitiveAttention(nn.Module):
    """``e_j = v . tanh(W s + V m_j + U f_j + b)``, where f are filters over the last weights and the sum of all weights.

    Args:
        query_dim, memory_dim: features of the query s and of the memory m.
        dim: of the sum.
        filters, kernel: of the convolution; the kernel is odd.
    """

    def __init__(self, query_dim: int, memory_dim: int, dim: int, filters: int, kernel: int) -> None:
        super().__init__()
        self.query = nn.Linear(query_dim, dim, bias=False)
        self.memory = nn.Linear(memory_dim, dim)  # its bias is b
        self.conv = nn.Conv1d(2, filters, kernel, padding=kernel // 2, bias=False)
        self.location = nn.Linear(filters, dim, bias=False)
        self.score = nn.Linear(dim, 1, bias=False)

    def keys(self, memory: Tensor) -> Tensor:
        """``V m_j + b``, ``(batch, symbols, dim)``: the same in every step."""
        output: Tensor = self.memory(memory)
        return output

    def place_filter(self) -> Tensor:
        """``U`` and the convolution in one, ``(dim, 2, kernel)``: both are linear, so that a step applies one of them."""
        return torch.einsum("df,fck->dck", self.location.weight, self.conv.weight)

    def forward(
        self, query: Tensor, keys: Tensor, memory: Tensor, places: Tensor, place_filter: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The context ``(batch, memory_dim)`` and the weights ``(batch, symbols)``.

        Args:
            query: ``(batch, query_dim)``.
            keys: of `keys`.
            memory: ``(batch, symbols, memory_dim)``.
            places: the last weights and their sum so far, ``(batch, 2, symbols)``.
            place_filter: of `place_filter`.
            mask: real symbols, ``(batch, symbols)``; the others get weight 0.
        """
        kernel = place_filter.shape[2]
        windows = F.pad(places, (kernel // 2, kernel // 2)).unfold(2, kernel, 1).transpose(1, 2).flatten(2)
        located = windows @ place_filter.flatten(1).T  # a product takes two thirds of a convolution's time here
        energies = self.score((keys + located + self.query(query)[:, None]).tanh())[..., 0]
        weights = energies.float().masked_fill(~mask, float("-inf")).softmax(1).to(memory.dtype)
        return torch.bmm(weights[:, None], memory)[:, 0], weights
