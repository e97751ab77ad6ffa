"""What happened to each layer: one line a layer, written as it happens, readable after a kill."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from layerwright.core.errors import InputError

__all__ = ["ApplyReport", "LayerRecord", "Reason", "Status"]

Status = Literal["done", "skipped", "failed"]
Reason = Literal[
    "as planned",
    "kept by the plan",
    "block dropped",
    "never reached by the calibration data",
    "some experts saw no tokens",
    "factorization damped",
    "factorization failed, rounded to nearest",
    "no calibration data needed",
    "tied to another layer",
]
"""Why a layer stands as it does: a closed list."""


@dataclass(frozen=True)
class LayerRecord:
    """One layer's outcome.

    Attributes:
        layer: path in the model that was given.
        treatment: what it got, in words.
        status: `done`, `skipped` or `failed`.
        reason: from the closed list `Reason`.
        error: relative squared error of the layer's output on the calibration data, None where it was not measured.
        tokens: calibration tokens (or positions) that the layer saw.
        bytes: stored bytes afterwards.
        seconds: time the treatment took, without the forward passes.
        note: details, such as the experts that saw no token.
    """

    layer: str
    treatment: str
    status: Status
    reason: Reason
    error: float | None = None
    tokens: int = 0
    bytes: int = 0
    seconds: float = 0.0
    note: str = ""

    def __post_init__(self) -> None:
        if self.reason not in get_args(Reason):
            raise InputError(f"reason: {self.reason!r} is not one of the known reasons")


@dataclass
class ApplyReport:
    """All records of one run of `apply`.

    With a `path` every record is appended to that JSON-lines file at once, so that it survives a kill.
    """

    records: list[LayerRecord] = field(default_factory=list)
    path: Path | None = None
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    resumed_at: str = ""

    def add(self, record: LayerRecord) -> None:
        """Keep `record` in place of an earlier one of the same layer, and write it if there is a file."""
        self.records = [known for known in self.records if known.layer != record.layer]
        self.records.append(record)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(dataclasses.asdict(record)) + "\n")
                file.flush()
                os.fsync(file.fileno())

    def __iter__(self) -> Iterator[LayerRecord]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def counts(self) -> dict[str, int]:
        """How many layers ended in each status."""
        return dict(Counter(record.status for record in self.records))

    def __str__(self) -> str:
        counts = ", ".join(f"{number} {status}" for status, number in sorted(self.counts().items()))
        odd = [f"{r.layer}: {r.reason}" for r in self.records if r.status == "failed" or r.note]
        return f"{len(self.records)} layers: {counts or 'none'}" + (f" ({'; '.join(odd[:5])})" if odd else "")

    def to_data(self) -> list[dict[str, Any]]:
        """Plain data for JSON."""
        return [dataclasses.asdict(record) for record in self.records]

    def save(self, path: Path) -> None:
        """Write all records to `path`, one line a layer, and keep that file as this report's own."""
        lines = [json.dumps(row) for row in self.to_data()]
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        self.path = path

    @classmethod
    def load(cls, path: Path) -> ApplyReport:
        """Read a JSON-lines file; a last line cut short by a kill is left out, and a layer's latest record counts."""
        latest: dict[str, LayerRecord] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                record = LayerRecord(**json.loads(line))
            except (json.JSONDecodeError, TypeError):
                continue
            latest[record.layer] = record
        return cls(list(latest.values()), path)
