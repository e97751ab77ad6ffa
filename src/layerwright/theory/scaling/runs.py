"""Training runs: sizes, data, steps, losses."""

from __future__ import annotations

import csv
import json
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import numpy
from numpy.typing import NDArray

from layerwright.core.errors import InputError, unknown_name

__all__ = ["Run", "RunTable"]

Array = NDArray[numpy.float64]


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        n_params: parameters without embeddings and positions.
        tokens: seen in training (of distinct text, for laws in the data).
        loss: cross-entropy on held-out text, nats per token (or another unit, the same in all runs).
        batch_tokens, steps: tokens of a batch and optimizer steps; None where not known.
        flops: of the whole training; ``6 n_params tokens`` where not given.
        curve: ``((step, loss), ...)`` along the run, after warm-up.
        seed: of the run; runs that differ in nothing else are repetitions.
        meta: anything else. ``unit`` (``nats`` or ``bits``) and ``vocabulary`` are looked at.
    """

    n_params: float
    tokens: float
    loss: float
    batch_tokens: float | None = None
    steps: float | None = None
    flops: float | None = None
    curve: tuple[tuple[float, float], ...] = ()
    seed: int = 0
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("n_params", "tokens", "batch_tokens", "steps", "flops"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise InputError(f"{name}: got {value}, expected a positive number")
        for loss in (self.loss, *(loss for _, loss in self.curve)):
            if not (math.isfinite(loss) and loss > 0):
                raise InputError(f"loss: got {loss}, expected a positive number (nats per token)")

    @property
    def compute(self) -> float:
        """Floating-point operations of the training: `flops`, or ``6 n_params tokens``."""
        return 6 * self.n_params * self.tokens if self.flops is None else self.flops


_FIELDS = {item.name for item in fields(Run)} - {"meta", "curve"}
_NUMBERS = _FIELDS - {"seed"}


@dataclass(frozen=True)
class RunTable:
    """Runs that are fitted together."""

    runs: tuple[Run, ...]

    @classmethod
    def from_records(cls, records: str | Path | Iterable[Run | Mapping[str, Any]]) -> Self:
        """From `Run`, mappings of its fields, or a ``.csv`` or ``.jsonl`` file of them; other columns go to `meta`.

        Runs whose loss is above ``log vocabulary`` (where `meta` tells it) diverged: they are left out with a warning.

        Raises:
            FileNotFoundError: no such file.
            InputError: no runs, a field that is missing or no number, a loss that is not positive, several units.
        """
        rows = _read(Path(records)) if isinstance(records, str | Path) else list(records)
        runs = [row if isinstance(row, Run) else _run(row, number) for number, row in enumerate(rows, 1)]
        if not runs:
            raise InputError("runs: got none, expected rows with n_params, tokens and loss")
        units = sorted({str(run.meta.get("unit", "nats")) for run in runs})
        if len(units) > 1:
            raise InputError(f"runs: losses are in several units ({', '.join(units)}); bring them to one")
        kept = [run for run in runs if run.loss <= math.log(float(run.meta.get("vocabulary") or math.inf))]
        if len(kept) < len(runs):
            warnings.warn(
                f"{len(runs) - len(kept)} of {len(runs)} runs have a loss above that of guessing; they are left out",
                UserWarning,
                stacklevel=2,
            )
        if not kept:
            raise InputError("runs: all of them diverged (a loss above log vocabulary)")
        return cls(tuple(kept))

    def __len__(self) -> int:
        return len(self.runs)

    def columns(self, names: Sequence[str]) -> Array:
        """The fields `names` as ``(names, runs)``; ``flops`` is each run's compute.

        Raises:
            InputError: a field that a run lacks.
        """
        found = []
        for name in names:
            values = [run.compute if name == "flops" else getattr(run, name) for run in self.runs]
            if any(value is None for value in values):
                raise InputError(f"{name}: {values.count(None)} of {len(values)} runs do not tell it; add the column")
            found.append(values)
        return numpy.array(found, dtype=numpy.float64)

    @property
    def losses(self) -> Array:
        """``(runs,)``."""
        return numpy.array([run.loss for run in self.runs])

    def groups(self) -> NDArray[numpy.int64]:
        """``(runs,)``: the same number for repetitions, runs that differ in seed and loss alone."""
        keys = [(run.n_params, run.tokens, run.batch_tokens, run.steps, run.flops) for run in self.runs]
        numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        return numpy.array([numbers[key] for key in keys])


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"no runs at {path}: give a .csv or .jsonl file with n_params, tokens and loss")
    text = path.read_text(encoding="utf-8")
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        try:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        except json.JSONDecodeError as error:
            raise InputError(f"{path}: not JSON lines ({error.msg} in line {error.lineno})") from error
        if not all(isinstance(row, dict) for row in rows):
            raise InputError(f"{path}: expected an object in every line")
        return rows
    if path.suffix.lower() != ".csv":
        raise InputError(f"{path} is a {path.suffix or 'plain'} file; runs are read from .csv and .jsonl")
    return [dict(row) for row in csv.DictReader(text.splitlines())]


def _run(row: Mapping[str, Any], number: int) -> Run:
    given = {str(key).strip(): value for key, value in row.items() if key is not None and value not in (None, "")}
    for name in ("n_params", "tokens", "loss"):
        if name not in given:
            raise (
                unknown_name("column", name, given, f"run {number}") if given else InputError(f"run {number} is empty")
            )
    values: dict[str, Any] = {}
    for name in _FIELDS & set(given):
        try:
            values[name] = float(given[name]) if name in _NUMBERS else int(given[name])
        except (TypeError, ValueError) as error:
            raise InputError(f"run {number}: {name} is {given[name]!r}, expected a number") from error
    curve = tuple((float(step), float(loss)) for step, loss in given.get("curve", ()))
    meta = {**dict(given.get("meta", {})), **{k: v for k, v in given.items() if k not in _FIELDS | {"meta", "curve"}}}
    try:
        return Run(**values, curve=curve, meta=meta)
    except InputError as error:
        raise InputError(f"run {number}: {error}") from error
