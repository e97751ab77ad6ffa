"""Requests to a served language model: made up, or read from a trace."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from layerwright.core.errors import InputError

__all__ = ["Request", "make_requests", "read_requests"]

_FIELDS = {
    "arrival": ("arrival", "arrival_s", "timestamp", "arrived_at"),
    "prompt": ("prompt", "prompt_tokens", "input_tokens", "num_prefill_tokens", "contexttokens"),
    "new": ("new", "new_tokens", "output_tokens", "num_decode_tokens", "generatedtokens"),
}


@dataclass(frozen=True, order=True)
class Request:
    """One request.

    Attributes:
        arrival: seconds from the start of the trace, 0 or more.
        prompt: tokens that are given, at least 1.
        new: tokens to make, at least 1.
    """

    arrival: float
    prompt: int
    new: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.arrival) and self.arrival >= 0):
            raise InputError(f"request: arrival: got {self.arrival}, expected seconds from 0")
        if self.prompt < 1 or self.new < 1:
            raise InputError(
                f"request: got {self.prompt} prompt and {self.new} new tokens, expected at least 1 of both"
            )


def make_requests(
    number: int, prompt: int, new: int, *, rate: float | None = None, spread: float = 0.0, seed: int = 0
) -> list[Request]:
    """Requests with Gaussian lengths, all there at the start or with Poisson arrivals.

    Args:
        number: of requests, at least 1.
        prompt, new: mean lengths in tokens.
        rate: requests per second; None puts all arrivals at 0.
        spread: standard deviation of the lengths over their means; no length is below 1 or above twice the mean.
        seed: of lengths and arrivals.

    Raises:
        InputError: a number or length below 1, a rate that is not above 0, a negative spread.
    """
    if number < 1 or prompt < 1 or new < 1:
        raise InputError(f"requests: got {number} of {prompt} and {new} tokens, expected at least 1 of each")
    if rate is not None and not (math.isfinite(rate) and rate > 0):
        raise InputError(f"rate: got {rate}, expected requests per second above 0")
    if not (math.isfinite(spread) and spread >= 0):
        raise InputError(f"spread: got {spread}, expected 0 or more")
    generator = np.random.default_rng(seed)
    arrivals = np.zeros(number) if rate is None else generator.exponential(1 / rate, number).cumsum()
    lengths = [
        np.clip(np.rint(generator.normal(mean, spread * mean, number)), 1, 2 * mean).astype(int)
        for mean in (prompt, new)
    ]
    return [Request(float(a), int(p), int(n)) for a, p, n in zip(arrivals, *lengths, strict=True)]


def read_requests(path: str | Path) -> list[Request]:
    """Requests from a ``.csv`` with a header or a ``.jsonl``, sorted by arrival; the first arrival becomes 0.

    Columns are ``arrival`` (seconds, or a date and time), ``prompt`` and ``new`` (tokens); the names of common public traces are known
    too. Without an arrival, all are there at the start.

    Raises:
        FileNotFoundError: no such file.
        InputError: another kind of file, no requests, or a line that cannot be read; the message names it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no trace at {path}: give a .csv or .jsonl file of requests")
    if path.suffix not in (".csv", ".jsonl"):
        raise InputError(f"{path}: got a {path.suffix or 'nameless'} file, expected .csv or .jsonl")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no text file ({error}): expected .csv or .jsonl of requests") from error
    rows = _csv_rows(text) if path.suffix == ".csv" else _json_rows(text, path)
    if not rows:
        raise InputError(f"{path}: no requests in it, expected columns arrival, prompt, new")
    found = [_request(row, f"{path}: line {line}") for line, row in rows]
    first = min(request.arrival for request in found)
    return sorted(Request(request.arrival - first, request.prompt, request.new) for request in found)


def _csv_rows(text: str) -> list[tuple[int, dict[str, Any]]]:
    return list(enumerate(csv.DictReader(text.splitlines()), start=2))


def _json_rows(text: str, path: Path) -> list[tuple[int, dict[str, Any]]]:
    rows = []
    for line, content in enumerate(text.splitlines(), start=1):
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}: line {line} is not valid JSON: {error}") from error
        if not isinstance(row, dict):
            raise InputError(f"{path}: line {line}: got {type(row).__name__}, expected an object")
        rows.append((line, row))
    return rows


def _request(row: dict[str, Any], where: str) -> Request:
    named = {str(key).strip().lower(): value for key, value in row.items()}
    arrival = _value(named, _FIELDS["arrival"], where, default=0.0)
    lengths: Sequence[float] = [_value(named, _FIELDS[key], where) for key in ("prompt", "new")]
    if any(length != int(length) for length in lengths):
        raise InputError(f"{where}: got {lengths} tokens, expected whole numbers")
    try:
        return Request(arrival, int(lengths[0]), int(lengths[1]))
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _value(row: dict[str, Any], names: Sequence[str], where: str, default: float | None = None) -> float:
    name = next((name for name in names if row.get(name) not in (None, "")), None)
    if name is None:
        if default is None:
            raise InputError(f"{where}: no {names[0]}, expected columns arrival, prompt, new")
        return default
    value = _number(row[name])
    if not math.isfinite(value):
        raise InputError(f"{where}: {name}: got {row[name]!r}, expected a number")
    return value


def _number(value: Any) -> float:
    """A number, or a date and time as seconds; not-a-number for anything else."""
    try:
        return float(value)
    except (TypeError, ValueError):
        pass
    try:
        return datetime.fromisoformat(str(value)).timestamp()
    except ValueError:
        return float("nan")
