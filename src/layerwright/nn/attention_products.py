"""Quantized products inside attention: query times key, and probabilities times value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from layerwright.core.errors import InputError
from layerwright.nn.activation import ActivationQuantizer
from layerwright.nn.attached import Attachment

__all__ = ["OPERANDS", "AttentionProducts", "watch_products"]

OPERANDS = ("query", "key", "probabilities", "value")
"""What the two products read, in the order in which they are computed."""


class AttentionProducts(Attachment):
    """Rounds the operands of an attention module's two products while that module runs.

    It works on the products themselves, fused (``scaled_dot_product_attention``) or written out (matmul, softmax,
    matmul), so that no architecture's code is repeated. With a fused call the products are computed one by one.

    Args:
        quantizers: by operand (`OPERANDS`); a missing one is left in floating point.
    """

    child = "products"

    def __init__(self, quantizers: Mapping[str, ActivationQuantizer]) -> None:
        super().__init__()
        unknown = set(quantizers) - set(OPERANDS)
        if unknown:
            raise InputError(f"quantizers: got {sorted(unknown)}, expected some of {', '.join(OPERANDS)}")
        self.quantizers = nn.ModuleDict({name: quantizers[name] for name in OPERANDS if name in quantizers})
        self._modes: list[_Products] = []

    def round(self, operand: str, x: Tensor) -> Tensor:
        """`x`, rounded if that operand has a quantizer."""
        return self.quantizers[operand](x) if operand in self.quantizers else x

    def before(self, owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Start looking at products."""
        mode = _Products(self.round)
        mode.__enter__()
        self._modes.append(mode)

    def after(self, owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Stop looking."""
        if self._modes:
            self._modes.pop().__exit__(None, None, None)

    def spec(self) -> dict[str, Any]:
        """Plain data from which `empty` builds the same form."""
        return {
            "type": "attention_products",
            "quantizers": {name: module.spec() for name, module in self.quantizers.items()},  # type: ignore[operator]
        }

    @classmethod
    def empty(cls, spec: Mapping[str, Any]) -> Self:
        """An attachment of that form."""
        return cls({name: ActivationQuantizer.empty(data) for name, data in spec["quantizers"].items()})


class watch_products:  # noqa: N801 - a context manager, called like a function
    """Context: ``see(operand, x)`` is called with what an attention module's products read; its value is used on.

    Enter it around the module's call. `see` returns the tensor to go on with.
    """

    def __init__(self, see: Any) -> None:
        self._mode = _Products(see)

    def __enter__(self) -> None:
        self._mode.__enter__()

    def __exit__(self, *error: object) -> None:
        self._mode.__exit__(*error)


class _Products(TorchFunctionMode):
    """Finds the two products by what they are: the second reads a softmax; the first comes before it."""

    def __init__(self, see: Any) -> None:
        super().__init__()
        self.see = see
        self._probabilities: set[int] = set()
        self._kept: list[Tensor] = []  # so that no address is used twice while the module runs

    def __exit__(self, *error: Any) -> None:
        self._probabilities.clear()
        self._kept.clear()
        super().__exit__(*error)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._fused(*args, **kwargs)
        if func in _SOFTMAX:
            out = func(*args, **kwargs)
            self._probabilities.add(out.data_ptr())
            self._kept.append(out)
            return out
        if func in _KEEPING and args and isinstance(args[0], Tensor) and args[0].data_ptr() in self._probabilities:
            # Attention in bfloat16 takes its softmax in float32 and converts it back.
            out = func(*args, **kwargs)
            self._probabilities.add(out.data_ptr())
            self._kept.append(out)
            return out
        if func in _MATMUL and len(args) >= 2 and _both_computed(args[0], args[1]):
            second = args[0].data_ptr() in self._probabilities
            left, right = ("probabilities", "value") if second else ("query", "key")
            right_value = args[1]
            # A key arrives transposed; a scale per channel belongs to its features, the last dimension before that.
            rounded = self.see(right, right_value if second else right_value.transpose(-1, -2))
            right_value = rounded if second else rounded.transpose(-1, -2)
            return func(self.see(left, args[0]), right_value, *args[2:], **kwargs)
        if func in _ADDED:
            return self._added(func, *args, **kwargs)
        return func(*args, **kwargs)

    def _added(self, func: Any, input: Tensor, batch1: Tensor, batch2: Tensor, **kwargs: Any) -> Tensor:
        """A first product that is added to a bias in the same call."""
        key = self.see("key", batch2.transpose(-1, -2)).transpose(-1, -2)
        added: Tensor = func(input, self.see("query", batch1), key, **kwargs)
        return added

    def _fused(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Attention product by product: ``(batch, heads, tokens, width)``."""
        query, key, value = self.see("query", query), self.see("key", key), self.see("value", value)
        if enable_gqa:
            groups = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
        scores = (query @ key.transpose(-1, -2)) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
        if is_causal:
            rows, columns = scores.shape[-2:]
            later = torch.ones(rows, columns, dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(later, float("-inf"))
        if attn_mask is not None:
            masked = attn_mask.dtype == torch.bool
            scores = scores.masked_fill(~attn_mask, float("-inf")) if masked else scores + attn_mask
        probabilities = scores.float().softmax(-1).to(query.dtype)
        probabilities = F.dropout(probabilities, dropout_p) if dropout_p else probabilities
        return self.see("probabilities", probabilities) @ value


_KEEPING = {Tensor.to, Tensor.type_as, Tensor.float, Tensor.contiguous, F.dropout, torch.dropout, Tensor.clone}
_SOFTMAX = {F.softmax, torch.softmax, Tensor.softmax}
_MATMUL = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm}

_ADDED = {torch.baddbmm, Tensor.baddbmm}


def _both_computed(left: Any, right: Any) -> bool:
    """Whether both are activations (a weight is a parameter)."""
    return all(isinstance(t, Tensor) and not isinstance(t, nn.Parameter) and t.dim() >= 3 for t in (left, right))
