"""A linear layer that trains its weight through rounding (LLM-QAT, Liu et al., 2023)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from layerwright.core.errors import InputError
from layerwright.nn.quantizer import grid
from layerwright.nn.rounded_cache import round_tokens

__all__ = ["FakeQuantLinear"]


class FakeQuantLinear(nn.Linear):
    """``round(x) @ round(W).T + bias``: one symmetric scale per token of `x` and per output row of `W`, found anew in
    every call; gradients pass straight through the rounding.

    Args:
        in_features, out_features: as for `nn.Linear`.
        weight_bits: 2 to 8, or 16 for no rounding.
        act_bits: of what it reads, likewise.
        bias: whether it has one.

    Raises:
        InputError: other bits.
    """

    def __init__(
        self, in_features: int, out_features: int, weight_bits: int = 4, act_bits: int = 16, *, bias: bool = True
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device="meta")
        for bits in (weight_bits, act_bits):
            if bits != 16:
                grid(bits)
        self.weight_bits, self.act_bits = weight_bits, act_bits

    @classmethod
    def from_linear(cls, linear: nn.Linear, weight_bits: int = 4, act_bits: int = 16) -> FakeQuantLinear:
        """A layer that shares the parameters of `linear`.

        Raises:
            InputError: not an `nn.Linear`, or other bits.
        """
        if not isinstance(linear, nn.Linear):
            raise InputError(f"linear: got {type(linear).__name__}, expected a linear layer")
        new = cls(linear.in_features, linear.out_features, weight_bits, act_bits, bias=linear.bias is not None)
        new.weight, new.bias = linear.weight, linear.bias
        return new.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """`x` ``(..., in)`` to ``(..., out)``."""
        weight = self.weight if self.weight_bits == 16 else round_tokens(self.weight, self.weight_bits)
        return F.linear(x if self.act_bits == 16 else round_tokens(x, self.act_bits), weight, self.bias)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{super().extra_repr()}, weight_bits={self.weight_bits}, act_bits={self.act_bits}"
