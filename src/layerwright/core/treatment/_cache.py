"""Treatments of what attention keeps of earlier tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from layerwright.core.errors import InputError
from layerwright.core.treatment._base import Treatment, known

__all__ = ["KVBudget"]


@known
@dataclass(frozen=True)
class KVBudget(Treatment):
    """Keep at most so many tokens in an attention module's key-value cache; nothing is stored with the model.

    Attributes:
        tokens: kept after each step; the token that is computed sees these and itself. At least ``sinks + 1``.
        policy: which ones: ``window``, the latest; ``streaming``, the first `sinks` and the latest (Xiao et al., 2023);
            ``h2o``, the latest and, head by head, those that got the most attention (Zhang et al., 2023).
        sinks: first tokens that `streaming` keeps.
        recent_fraction: share of `tokens` that `h2o` gives to the latest.
        positions: ``absolute`` leaves a key the position at which it was computed; ``cache`` counts positions within the
            cache (rotary embeddings only).
    """

    tag: ClassVar[str] = "kv"
    rank: ClassVar[int] = 45
    scope: ClassVar[Literal["weight", "block", "attention"]] = "attention"
    tokens: int = 128
    policy: Literal["window", "streaming", "h2o"] = "window"
    sinks: int = 4
    recent_fraction: float = 0.5
    positions: Literal["absolute", "cache"] = "absolute"

    def __post_init__(self) -> None:
        for name in ("tokens", "sinks"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise InputError(f"{name}: got {value!r}, expected a whole number")
        if self.tokens < self.sinks + 1:
            raise InputError(f"tokens: got {self.tokens}, expected at least {self.sinks + 1} (sinks and one more)")
        if not 0 <= self.recent_fraction <= 1:
            raise InputError(f"recent_fraction: got {self.recent_fraction}, expected a share from 0 to 1")

    def label(self) -> str:
        """A short name for tables and charts."""
        return f"kv {self.tokens} {self.policy}"
