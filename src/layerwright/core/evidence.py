"""What a study measured: its table, its checks, its verdict."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from layerwright.core.errors import InputError

__all__ = ["Check", "Evidence"]


@dataclass(frozen=True)
class Check:
    """One claim as an inequality: `measured` `relation` `bound`."""

    name: str
    measured: float
    bound: float
    relation: Literal["<=", ">="] = "<="

    def __post_init__(self) -> None:
        if self.relation not in ("<=", ">="):
            raise InputError(f"relation: got {self.relation!r}, expected '<=' or '>='")

    @property
    def holds(self) -> bool:
        """Whether the measured value keeps to the bound; NaN does not."""
        return self.measured <= self.bound if self.relation == "<=" else self.measured >= self.bound

    def to_data(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "name": self.name,
            "measured": self.measured,
            "bound": self.bound,
            "relation": self.relation,
            "holds": self.holds,
        }


@dataclass(frozen=True)
class Evidence:
    """A study's outcome.

    Attributes:
        slug: of the system.
        claim: what the paper claims, in one or two sentences.
        table: rows of measurements.
        checks: the claims as inequalities.
        seconds: how long the study took.
        seeds: those that were used.
        notes: what a reader must know: settings that were changed and why.
    """

    slug: str
    claim: str
    table: Sequence[Mapping[str, Any]]
    checks: Sequence[Check]
    seconds: float = 0.0
    seeds: Sequence[int] = (0,)
    notes: Sequence[str] = ()
    versions: Mapping[str, str] = field(default_factory=lambda: _versions())

    @property
    def holds(self) -> bool:
        """Whether every check holds; a study without checks proves nothing."""
        return bool(self.checks) and all(check.holds for check in self.checks)

    @property
    def verdict(self) -> Literal["holds", "does not hold"]:
        """`holds` or `does not hold`."""
        return "holds" if self.holds else "does not hold"

    def to_data(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "slug": self.slug,
            "claim": self.claim,
            "table": [dict(row) for row in self.table],
            "checks": [check.to_data() for check in self.checks],
            "verdict": self.verdict,
            "seconds": self.seconds,
            "seeds": list(self.seeds),
            "versions": dict(self.versions),
            "notes": list(self.notes),
        }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "layerwright"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
