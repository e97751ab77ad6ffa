"""Treatments of a whole block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from layerwright.core.treatment._base import Treatment, known

__all__ = ["Drop"]


@known
@dataclass(frozen=True)
class Drop(Treatment):
    """Remove the whole block: its input passes on unchanged."""

    tag: ClassVar[str] = "drop"
    scope: ClassVar[Literal["weight", "block", "attention"]] = "block"
