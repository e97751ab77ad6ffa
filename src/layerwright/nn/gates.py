"""Gates that decide for each token: run or skip a part, or how far two results are blended."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from layerwright.core.errors import InputError

__all__ = ["TokenGate", "TokenMixer", "TokenRouter", "tokens_kept", "top_tokens"]


class TokenGate(nn.Module):
    """A number between 0 and 1 for each token: a linear map to one value, squashed.

    Args:
        dim: features of a token.
        kind: ``sigmoid``, or ``tanh`` for ``tanh(z) / 2 + 1/2``, which is ``sigmoid(2 z)``.
        bias: whether the map has one.
    """

    bias: nn.Parameter | None

    def __init__(self, dim: int, kind: Literal["sigmoid", "tanh"] = "sigmoid", bias: bool = False) -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.zeros(dim))
        self.register_parameter("bias", nn.Parameter(torch.zeros(1)) if bias else None)

    @property
    def dim(self) -> int:
        """Features of a token."""
        return self.weight.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """Gates ``(...)`` in float32 of tokens ``(..., dim)``."""
        values = nn.functional.linear(x, self.weight[None], self.bias).squeeze(-1).float()
        return values.sigmoid() if self.kind == "sigmoid" else 0.5 * values.tanh() + 0.5

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{self.dim}, {self.kind}"


class TokenRouter(TokenGate):
    """``sigmoid(w . x)`` with ``w = 0`` at the start (Tan et al., 2024, DLO).

    A token is run where it is above one half, so that an untrained router runs none.

    Args:
        dim: features of a token.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim, "sigmoid")


class TokenMixer(TokenGate):
    """``tanh(w . x + b) / 2 + 1/2`` (Lee et al., 2024, TroL).

    Args:
        dim: features of a token.
        start: the gate of every token at the start, between 0 and 1; the weight then begins at zero.

    Raises:
        InputError: `start` outside the open interval.
    """

    def __init__(self, dim: int, start: float = 0.5) -> None:
        if not 0 < start < 1:
            raise InputError(f"init_gate: got {start}, expected a number between 0 and 1, both excluded")
        super().__init__(dim, "tanh", bias=True)
        self.bias = nn.Parameter(torch.full((1,), math.atanh(2 * start - 1)))


def tokens_kept(count: int, share: float) -> int:
    """``ceil(share * count)``, at least 1 and at most `count`; a product that is whole but for rounding stays whole."""
    return max(1, min(count, math.ceil(count * share - 1e-9)))


def top_tokens(values: Tensor, share: float, real: Tensor) -> Tensor:
    """Mask of the largest ``ceil(share * tokens)`` of `values` among `real` tokens; what ties with the last is in too.

    Args:
        values: any shape.
        share: of the real tokens, above 0; above 1 is all.
        real: boolean, broadcast to that shape: padding is never chosen.
    """
    real = real.expand(values.shape)
    found = values[real]
    if not found.numel():
        return torch.zeros_like(real)
    kept = tokens_kept(found.numel(), share)
    if kept == found.numel():
        return real.clone()
    threshold = found.topk(kept, sorted=False).values.min()
    return real & (values >= threshold)
