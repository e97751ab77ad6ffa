"""A constant factor on the output of a norm (LayerNorm Scaling; Sun et al., 2025)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Self

from torch import Tensor, nn

from layerwright.core.errors import InputError
from layerwright.nn.attached import Attachment

__all__ = ["NormScale"]


class NormScale(Attachment):
    """Multiplies what a norm gives, after its gain, by a constant. No parameters.

    Args:
        factor: positive.

    Raises:
        InputError: a factor that is not positive and finite.
    """

    child = "norm_scale"

    def __init__(self, factor: float) -> None:
        super().__init__()
        if not (math.isfinite(factor) and factor > 0):
            raise InputError(f"factor: got {factor}, expected a positive number")
        self.factor = float(factor)

    def after(self, owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The norm's output, scaled."""
        return output * self.factor if isinstance(output, Tensor) else None

    def spec(self) -> dict[str, Any]:
        """Plain data from which `empty` builds the same form."""
        return {"type": "norm_scale", "factor": self.factor}

    @classmethod
    def empty(cls, spec: Mapping[str, Any]) -> Self:
        """An attachment of that form."""
        return cls(spec["factor"])

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{self.factor:.4g}"
