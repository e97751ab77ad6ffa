"""Labelled data whose classes need not be those of the model: for tuners that put a new readout on it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from layerwright.core.calibration import Calibration
from layerwright.core.errors import InputError
from layerwright.data.image_folder import image_folder
from layerwright.data.loading import Source, modality, processor_for
from layerwright.recipes.bench import refuse_misfits

__all__ = ["labelled_data"]

_BATCHES = 10
"""At least so many, where there are enough samples: a fifth of the batches is held out."""


def labelled_data(
    source: Source, data: str | Path | None, length: int = 256
) -> tuple[str | Path | Calibration | None, tuple[str, ...] | None]:
    """`data` as batches and the names of its classes; what is no such file or folder comes back as it is.

    Args:
        source: of the model.
        data: for images a folder with one subfolder for each class, or an ``.npz`` with x and y; for text a ``.jsonl``
            with the fields ``text`` and ``label`` on each line.
        length: tokens of a text at most.

    Raises:
        FileNotFoundError, InputError: what cannot be read, or images that the model does not take.
    """
    if data is None:
        return None, None
    path, kind = Path(data), modality(source)
    if kind != "text" and path.is_dir():
        folder = image_folder(path, source.config, processor_for(source))
        size = _batch_size(len(folder.labels))
        return _fitting(source, folder.calibration(size), len(folder.classes)), folder.classes
    if kind != "text" and path.suffix.lower() == ".npz" and path.is_file():
        return _fitting(source, Calibration.from_arrays(path, _batch_size(1000)), None), None
    if kind == "text" and path.suffix.lower() in (".jsonl", ".ndjson") and path.is_file():
        return _texts(source, path, length)
    return data, None


def _batch_size(samples: int) -> int:
    return max(1, min(32, samples // _BATCHES))


def _fitting(source: Source, data: Calibration, classes: int | None) -> Calibration:
    """`data`, after the model's shapes were checked with as many classes as the data has."""
    count = classes or max(int(batch["labels"].max()) for batch in data) + 1
    relabelled = source.config | {"id2label": dict.fromkeys(range(count))}
    refuse_misfits(dataclasses.replace(source, config=relabelled), data)
    return data


def _texts(source: Source, path: Path, length: int) -> tuple[Calibration, tuple[str, ...]]:
    rows = [
        _row(path, number, line)
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1)
        if line.strip()
    ]
    if len({label for _, label in rows}) < 2:
        raise InputError(f"{path}: got {len(rows)} texts of fewer than 2 classes")
    tokenizer = processor_for(source)
    if tokenizer is None:
        raise InputError(f"{source.name} has no tokenizer, which text needs")
    rows = _in_turns(rows)
    classes = tuple(sorted({label for _, label in rows}))
    longest = min(length, int(source.config.get("max_position_embeddings") or length))
    encoded = tokenizer(
        [text for text, _ in rows], padding=True, truncation=True, max_length=longest, return_tensors="pt"
    )
    labels = torch.tensor([classes.index(label) for _, label in rows])
    size = _batch_size(len(rows))
    parts = {name: encoded[name].split(size) for name in encoded} | {"labels": labels.split(size)}
    batches = [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)]
    return Calibration(batches, name=path.name, unit="nats/sample"), classes


def _row(path: Path, number: int, line: str) -> tuple[str, str]:
    try:
        record: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{number}: not JSON ({error.msg})") from error
    text, label = (record.get("text"), record.get("label")) if isinstance(record, dict) else (None, None)
    if not isinstance(text, str) or isinstance(label, bool) or not isinstance(label, str | int):
        raise InputError(f'{path}:{number}: expected an object with a "text" and a "label" (a name or a number)')
    return text, str(label)


def _in_turns(rows: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Classes in turns, so that what is held out at the end has all of them."""
    seen: dict[str, int] = {}
    turns = []
    for row in rows:
        seen[row[1]] = seen.get(row[1], 0) + 1
        turns.append((seen[row[1]], row))
    return [row for _, row in sorted(turns, key=lambda pair: pair[0])]
