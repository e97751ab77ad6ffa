"""Budgets: ``bits=4.25``, ``size=0.4x,ms=0.8x``; parsed and validated in this one place."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from layerwright.core.errors import BudgetError, unknown_name

__all__ = ["Budget", "Limit"]

Unit = Literal["relative", "absolute"]

_RESOURCES = {
    "bits": "bytes",
    "size": "bytes",
    "params": "params",
    "flops": "flops",
    "ms": "ms",
    "kv": "kv_bytes_per_token",
}
_SCALES = {
    "": 1,
    "k": 1e3,
    "m": 1e6,
    "g": 1e9,
    "b": 1,
    "kb": 1e3,
    "mb": 1e6,
    "gb": 1e9,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
}
_NUMBER = re.compile(r"^([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*([a-z%]*)$")


@dataclass(frozen=True)
class Limit:
    """An upper bound on one resource.

    Attributes:
        name: `bits` (average over the planned layers, at the recipe's group size), `size`, `params`, `flops`, `ms`, `kv`.
        value: the bound.
        unit: `relative` to the untouched model (``0.4x``, ``40%``), or `absolute`.
    """

    name: str
    value: float
    unit: Unit

    @property
    def resource(self) -> str:
        """The field of `Cost` that it bounds."""
        return _RESOURCES[self.name]

    def __str__(self) -> str:
        return f"{self.name}={self.value:g}{'x' if self.unit == 'relative' else ''}"


@dataclass(frozen=True)
class Budget:
    """One or several limits, all of which must hold."""

    limits: tuple[Limit, ...]

    @classmethod
    def parse(cls, text: str | Budget) -> Budget:
        """Read ``"bits=4.25"``, ``"size=0.4x,ms=0.8x"``, ``"size=500MB"``.

        Raises:
            BudgetError: malformed, unknown, repeated, zero or negative limits.
        """
        if isinstance(text, Budget):
            return text
        parts = [part.strip() for part in str(text).split(",") if part.strip()]
        if not parts:
            raise BudgetError(f"budget: got {text!r}, expected one like bits=4.25 or size=0.4x,ms=0.8x")
        limits = tuple(_parse_limit(part) for part in parts)
        names = [limit.resource for limit in limits]
        for name in names:
            if names.count(name) > 1:
                raise BudgetError(f"budget: {text!r} limits {name.replace('_', ' ')} twice; give it once")
        return cls(limits)

    def __iter__(self) -> Iterator[Limit]:
        return iter(self.limits)

    def __str__(self) -> str:
        return ",".join(map(str, self.limits))


def _parse_limit(part: str) -> Limit:
    name, equals, value = (piece.strip().lower() for piece in part.partition("="))
    if not equals:
        raise BudgetError(f"budget: {part!r} has no '='; write it like bits=4.25 or size=0.4x")
    if name not in _RESOURCES:
        raise BudgetError(str(unknown_name("budget", name, _RESOURCES)))
    match = _NUMBER.match(value)
    if not match:
        raise BudgetError(f"budget: {part!r} is not a positive number with an optional unit (0.4x, 40%, 500MB)")
    number, suffix = float(match[1]), match[2]
    if number <= 0:
        raise BudgetError(f"budget: {part!r} must be above zero")
    if suffix in ("x", "%"):
        if name == "bits":
            raise BudgetError(f"budget: {part!r}: bits is an absolute number of bits per weight, such as bits=4.25")
        return Limit(name, number / 100 if suffix == "%" else number, "relative")
    if suffix not in _SCALES or (suffix and name in ("bits", "ms")):
        raise BudgetError(f"budget: {part!r} has the unknown unit {suffix!r}; use x, %, or for size KB, MB, GB")
    if name == "bits" and not 1 <= number <= 32:
        raise BudgetError(f"budget: bits={number:g} is outside 1..32")
    if name != "bits" and not suffix and number <= 1:
        raise BudgetError(f"budget: {part!r} looks relative; write {name}={number:g}x")
    return Limit(name, number * _SCALES[suffix], "absolute")
