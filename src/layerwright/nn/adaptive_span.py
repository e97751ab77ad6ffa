"""A learned length of context for each head of attention (Sukhbaatar et al., 2019)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from layerwright.core.errors import InputError

__all__ = ["AdaptiveSpan"]

_STEP = 64
"""Keys are left out, and caches shortened, in steps of this many, so that shapes seldom change."""


class AdaptiveSpan(nn.Module):
    """``m(l) = clamp((z L - (l - 1)) / R + 1, 0, 1)`` for the key at distance `l`, with ``z`` learned for each head.

    The nearest key is always seen whole. After a step of the optimizer `clamp_` keeps ``z`` in its range.

    Sukhbaatar, Grave, Bojanowski and Joulin, 2019, Adaptive Attention Span in Transformers, arXiv 1905.07799.

    Args:
        num_heads: heads.
        max_span: the longest distance, L.
        ramp: keys over which the mask falls from 1 to 0, R, at least 1.
        init: ``z`` at the start, between 0 and 1.

    Raises:
        InputError: a number outside its range.
    """

    def __init__(self, num_heads: int, max_span: int, ramp: int = 32, init: float = 0.0) -> None:
        super().__init__()
        for name, value in (("num_heads", num_heads), ("max_span", max_span), ("ramp", ramp)):
            if value < 1:
                raise InputError(f"{name}: got {value}, expected at least 1")
        if not 0 <= init <= 1:
            raise InputError(f"init: got {init}, expected a share of the longest span, 0 to 1")
        self.max_span, self.ramp = max_span, ramp
        self.z = nn.Parameter(torch.full((num_heads, 1, 1), float(init)))

    def mask(self, length: int) -> Tensor:
        """``(heads, 1, length)``, at least float32, for the nearest `length` keys, the nearest one last."""
        z = self.z.to(torch.promote_types(self.z.dtype, torch.float32))
        nearer = torch.arange(length - 1, -1, -1, device=z.device, dtype=z.dtype)
        return ((z * self.max_span - nearer) / self.ramp + 1).clamp(0, 1)

    def penalty(self) -> Tensor:
        """``L mean(z)``, the mean span in tokens: a share of it (1e-7 to 5e-7 as published) is added to the loss."""
        return self.max_span * self.z.float().mean()

    @torch.no_grad()
    def clamp_(self) -> None:
        """Bring ``z`` back to 0 to 1, in place."""
        self.z.clamp_(0, 1)

    def current_max(self) -> int:
        """The longest span of a head in tokens, without the ramp."""
        return math.ceil(float(self.z.detach().max()) * self.max_span)

    def kept(self) -> int:
        """How many of the nearest keys must be computed: the others have the mask 0. The longest span less a multiple of 64."""
        beyond = self.max_span - min(self.max_span, self.current_max() + self.ramp)
        return self.max_span - beyond // _STEP * _STEP

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{self.z.shape[0]}, max_span={self.max_span}, ramp={self.ramp}"
