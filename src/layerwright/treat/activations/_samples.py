"""A bounded random sample of what a layer reads, with the exact extremes."""

from __future__ import annotations

import torch
from torch import Tensor

from layerwright.core.errors import InputError

__all__ = ["Samples"]


class Samples:
    """Rows ``(tokens, channels)`` of a stream of activations.

    Holds at most `rows` rows and `numel` values; when more come, each row of the stream has the same chance to be kept
    (reservoir sampling by random keys). The least and the largest value of each channel are exact.
    """

    def __init__(self, *, numel: int = 1 << 20, rows: int = 4096, seed: int = 0) -> None:
        self.numel, self.rows = numel, rows
        self._generator = torch.Generator().manual_seed(seed)
        self._kept: Tensor | None = None
        self._keys = torch.empty(0)
        self.low: Tensor | None = None
        self.high: Tensor | None = None
        self.tokens = 0

    def update(self, x: Tensor) -> None:
        """Add activations ``(..., channels)``."""
        flat = x.detach().reshape(-1, x.shape[-1]).float()
        if not len(flat):
            return
        low, high = flat.amin(0), flat.amax(0)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)
        self.tokens += len(flat)
        limit = max(min(self.rows, self.numel // flat.shape[1]), 16)
        keys = torch.rand(len(flat), generator=self._generator)
        if len(flat) > limit:
            keys, places = keys.topk(limit)
            flat = flat[places]
        merged = flat if self._kept is None else torch.cat([self._kept, flat])
        keys = torch.cat([self._keys, keys])
        if len(merged) > limit:
            keys, places = keys.topk(limit)
            merged = merged[places]
        self._kept, self._keys = merged.clone() if merged is flat else merged, keys

    def values(self, name: str) -> Tensor:
        """The sample ``(tokens, channels)`` float32.

        Raises:
            InputError: nothing was seen, or what was seen is not finite; names the layer.
        """
        if self._kept is None or self.low is None or self.high is None:
            raise InputError(f"{name}: the calibration data never reached it; its activations have no range")
        if not bool((self.low.isfinite() & self.high.isfinite()).all()):
            raise InputError(f"{name}: its calibration activations hold NaN or infinity; check the data and the dtype")
        return self._kept
