"""Matrix products in the arithmetic that is fastest here."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["fast_products"]

_FEW_ROWS = 64
"""Below this many rows the product waits for the weight, not for arithmetic: half the bytes win."""


def fast_products() -> AbstractContextManager[None]:
    """Context: linear layers in bfloat16 multiply in float32 where this processor is faster at that.

    The product of bfloat16 numbers is exact in float32 and sums are kept in float32 either way, so that only the order
    of summation differs; the result is rounded to bfloat16 once. A CPU without tile instructions takes about 1.5 times
    as long for bfloat16 products. Extra memory: one layer's weight and activations in float32. Without gradients only.
    """
    if torch.is_grad_enabled() or _has_tiles():
        return nullcontext()
    return _Float32Products()


class _Float32Products(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is nn.functional.linear and not kwargs and len(args) >= 2:
            x, weight = args[:2]
            # Slices of a parameter belong to experts, which have few rows each.
            if isinstance(weight, nn.Parameter) and _slow(x, weight):
                bias = args[2].float() if len(args) > 2 and args[2] is not None else None
                return nn.functional.linear(x.float(), weight.float(), bias).to(x.dtype)
        return func(*args, **(kwargs or {}))


def _slow(x: Tensor, weight: Tensor) -> bool:
    return (
        x.dtype == weight.dtype == torch.bfloat16
        and x.device.type == weight.device.type == "cpu"
        and x.numel() >= _FEW_ROWS * max(x.shape[-1], 1)
    )


@functools.cache
def _has_tiles() -> bool:
    """Whether the processor multiplies bfloat16 in tiles (AMX), many times faster than float32."""
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(supported()) if supported is not None else False
