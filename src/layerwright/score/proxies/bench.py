"""A table of bit vectors with what was measured for each: the ground truth that proxies are ranked against."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from layerwright.core.errors import InputError

__all__ = ["BitBench", "spearman", "vector_scores"]

Floats = np.ndarray[Any, np.dtype[np.float64]]
Integers = np.ndarray[Any, np.dtype[np.intp]]

FEWEST = 10
"""Records below which a rank correlation says nothing."""


@dataclass(frozen=True)
class BitBench:
    """Measured bit vectors of one model (after MQ-Bench-101 of Dong et al., EMQ, 2023).

    Attributes:
        layers: paths, in the order of the vectors.
        records: bits of every layer to the measured metric.
        higher_is_better: True for an accuracy, False for a loss.
        metric: what was measured, with its unit.
        base: the metric of the untouched model.
        model, data: name and fingerprint of the model, and what was measured on.
        generator: the command or call that measures it again.

    Raises:
        InputError: fewer than 10 records, a vector of the wrong length, a metric that is not finite or constant.
    """

    layers: tuple[str, ...]
    records: Mapping[tuple[int, ...], float]
    higher_is_better: bool = False
    metric: str = "nats/sample"
    base: float | None = None
    model: str = ""
    data: str = ""
    generator: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.records) < FEWEST:
            raise InputError(f"bench: got {len(self.records)} records, expected at least {FEWEST} to correlate ranks")
        for bits, value in self.records.items():
            if len(bits) != len(self.layers):
                raise InputError(
                    f"bench: a vector has {len(bits)} bits, expected one for each of {len(self.layers)} layers"
                )
            if not np.isfinite(value):
                raise InputError(f"bench: the metric of {bits} is {value}; measure it again or leave it out")
        if len(set(self.records.values())) == 1:
            raise InputError(
                "bench: every record has the same metric, so ranks are not defined; measure something finer"
            )

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, bits: Sequence[int]) -> float:
        """The metric of a vector."""
        try:
            return self.records[tuple(bits)]
        except KeyError:
            raise InputError(f"bench: {tuple(bits)} was not measured") from None

    @property
    def vectors(self) -> Integers:
        """``(records, layers)`` bits."""
        return np.array(list(self.records), dtype=np.intp)

    @property
    def quality(self) -> Floats:
        """``(records,)`` the metric, with its sign such that higher is better."""
        values = np.array(list(self.records.values()), dtype=np.float64)
        return values if self.higher_is_better else -values

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths that occur, ascending."""
        return tuple(int(w) for w in np.unique(self.vectors))

    def take(self, numbers: Sequence[int]) -> BitBench:
        """The records of those numbers."""
        rows = list(self.records.items())
        return replace(self, records=dict(rows[int(number)] for number in numbers))

    def split(self, first: int, seed: int = 0) -> tuple[BitBench, BitBench]:
        """`first` records drawn by `seed`, and the others."""
        order = np.random.default_rng(seed).permutation(len(self))
        return self.take(order[:first].tolist()), self.take(order[first:].tolist())

    def split_half(self, seed: int = 0) -> tuple[BitBench, BitBench]:
        """Two halves drawn by `seed`: to search on, and to judge."""
        return self.split(len(self) // 2, seed)

    def save(self, path: str | Path) -> Path:
        """Write JSON under a temporary name and rename it."""
        data = {
            "layerwright_bit_bench": 1,
            "model": self.model,
            "data": self.data,
            "metric": self.metric,
            "higher_is_better": self.higher_is_better,
            "base": self.base,
            "generator": self.generator,
            "meta": dict(self.meta),
            "layers": list(self.layers),
            "records": [["".join(map(str, bits)), value] for bits, value in self.records.items()],
        }
        return write_atomically(Path(path), data)

    @classmethod
    def load(cls, path: str | Path) -> BitBench:
        """Read what `save` wrote.

        Raises:
            InputError: another file, or bad records.
        """
        try:
            data = json.loads(Path(path).read_text())
            if data["layerwright_bit_bench"] != 1:
                raise KeyError("version")
            return cls(
                layers=tuple(data["layers"]),
                records={tuple(map(int, bits)): float(value) for bits, value in data["records"]},
                higher_is_better=bool(data["higher_is_better"]),
                metric=data["metric"],
                base=data["base"],
                model=data["model"],
                data=data["data"],
                generator=data["generator"],
                meta=data["meta"],
            )
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} is not a table of bit vectors of this version ({error}); build it again"
            ) from error


def write_atomically(path: Path, data: Any) -> Path:
    """Write JSON; a reader sees the old file or the new one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(data, separators=(",", ":")) + "\n")
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror or error})") from error
    return path


def vector_scores(gains: Floats, vectors: Integers, widths: Sequence[int]) -> Floats:
    """``(n,)`` scores of bit vectors ``(n, layers)`` from what each layer gains at each width ``(layers, widths)``.

    Raises:
        InputError: vectors of another length, or a width without a gain.
    """
    if vectors.ndim != 2 or vectors.shape[1] != len(gains):
        raise InputError(f"bits: got vectors of shape {vectors.shape}, expected (n, {len(gains)}), one per layer")
    known = np.asarray(widths)
    order = np.argsort(known)
    place = order[np.clip(np.searchsorted(known, vectors, sorter=order), 0, len(known) - 1)]
    if not (known[place] == vectors).all():
        raise InputError(f"bits: got widths {np.unique(vectors).tolist()}, and gains are known for {known.tolist()}")
    return np.asarray(gains[np.arange(len(gains)), place].sum(axis=1))


def spearman(scores: Floats, quality: Floats, top: float = 1.0) -> float:
    """Spearman's rank correlation among the best share `top` of `quality`; ties get average ranks.

    NaN where either is constant there, or a score is NaN.

    Raises:
        InputError: fewer than 2 values are left, or lengths differ.
    """
    from scipy.stats import rankdata

    if len(scores) != len(quality) or not 0 < top <= 1:
        raise InputError(
            f"spearman: got {len(scores)} and {len(quality)} values and top={top}, expected equal lengths, 0 to 1"
        )
    count = int(np.ceil(top * len(quality) - 1e-9))
    if count < 2:
        raise InputError(f"spearman: {count} of {len(quality)} values are left at top={top}, expected at least 2")
    best = np.argsort(-quality, kind="stable")[:count]
    if not np.isfinite(scores[best]).all():
        return float("nan")
    a, b = (rankdata(values[best]) for values in (scores, quality))
    a, b = a - a.mean(), b - b.mean()
    norm = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / norm if norm > 0 else float("nan")
