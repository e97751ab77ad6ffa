"""What a treatment is, and the list of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, TypeVar

from layerwright.core.errors import InputError

__all__ = ["TREATMENTS", "Treatment", "Treatments", "check_width", "known"]

T = TypeVar("T", bound="Treatment")


@dataclass(frozen=True)
class Treatment:
    """Base of all treatments. A subclass sets `tag` (its YAML key) and its `rank` (order of application)."""

    tag: ClassVar[str] = ""
    rank: ClassVar[int] = 0
    scope: ClassVar[Literal["weight", "block", "attention"]] = "weight"

    def label(self) -> str:
        """A short name for tables and charts."""
        return self.tag


Treatments = tuple[Treatment, ...]
"""What one layer gets, in order of application. The empty tuple leaves the layer alone."""

TREATMENTS: dict[str, type[Treatment]] = {}
"""Treatment classes by YAML tag."""


def known(cls: type[T]) -> type[T]:
    """Enter a class in `TREATMENTS` under its tag."""
    TREATMENTS[cls.tag] = cls
    return cls


def check_width(bits: object, name: str = "bits") -> None:
    """Refuse what is no whole number from 2 to 8.

    Raises:
        InputError: naming the setting.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
        raise InputError(f"{name}: got {bits!r}, expected a whole number from 2 to 8")
