"""Labelled samples that can be taken by position."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from layerwright.core.calibration import Calibration
from layerwright.core.errors import InputError

__all__ = ["Samples", "index_batches"]

LABELS = "labels"


@dataclass(frozen=True)
class Samples:
    """Inputs and one class for each.

    Attributes:
        inputs: tensors ``(samples, ...)`` by argument name, or ``{"": tensor}`` for the first argument.
        labels: ``(samples,)``.
    """

    inputs: Mapping[str, Tensor]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def classes(self) -> int:
        """One more than the highest label."""
        return int(self.labels.max()) + 1

    def take(self, index: Tensor) -> Any:
        """The samples at the positions `index` as a batch of the kind that they came in."""
        place = index.to(self.labels.device)
        if "" in self.inputs:
            return self.inputs[""][place], self.labels[place]
        return {name: value[place] for name, value in self.inputs.items()} | {LABELS: self.labels[place]}

    @classmethod
    def of(cls, data: Calibration) -> Samples:
        """All samples of `data`; texts of different lengths are padded on the right where there is an ``attention_mask``.

        Raises:
            InputError: batches that are no ``(inputs, labels)`` and no mappings with ``labels``, or labels that are not
                one class for each sample.
        """
        parts = [_parts(batch, data.name) for batch in data]
        labels = torch.cat([own for _, own in parts])
        if int(labels.min()) < 0:
            raise InputError(f"{data.name}: got the label {int(labels.min())}, expected classes counted from 0")
        names = list(parts[0][0])
        if any(list(inputs) != names for inputs, _ in parts):
            raise InputError(f"{data.name}: batches differ in what they hold; give all of them {', '.join(names)}")
        padded = "attention_mask" in names
        joined = {name: _join([inputs[name] for inputs, _ in parts], padded, data.name) for name in names}
        return cls(joined, labels)


def index_batches(positions: Tensor, batch_size: int, steps: int, seed: int) -> list[Tensor]:
    """`steps` batches of `positions`, one shuffle after the other; all are full, with at most all positions in one."""
    size = min(batch_size, len(positions))
    generator = torch.Generator().manual_seed(seed)
    rounds = -(-steps * size // len(positions))
    order = torch.cat([torch.randperm(len(positions), generator=generator) for _ in range(rounds)])
    return list(positions[order[: steps * size]].split(size))


def _parts(batch: Any, name: str) -> tuple[dict[str, Tensor], Tensor]:
    labels: Any = None
    inputs: dict[str, Tensor] = {}
    if isinstance(batch, Mapping):
        labels = batch.get(LABELS)
        inputs = {key: value for key, value in batch.items() if key != LABELS and isinstance(value, Tensor)}
    elif isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[0], Tensor):
        inputs, labels = {"": batch[0]}, batch[1]
    if not isinstance(labels, Tensor) or not inputs:
        raise InputError(
            f"{name}: expected batches (inputs, labels), or mappings that hold labels, to train a classifier"
        )
    if labels.dim() != 1 or labels.is_floating_point() or any(len(value) != len(labels) for value in inputs.values()):
        raise InputError(
            f"{name}: got labels of shape {tuple(labels.shape)} ({labels.dtype}), expected one class for each sample: "
            "blocks are chosen by the accuracy of a classifier"
        )
    return inputs, labels


def _join(tensors: list[Tensor], padded: bool, name: str) -> Tensor:
    shapes = {tuple(tensor.shape[1:]) for tensor in tensors}
    if len(shapes) > 1 and padded and all(len(shape) == 1 for shape in shapes):
        longest = max(shape[0] for shape in shapes)
        tensors = [torch.nn.functional.pad(tensor, (0, longest - tensor.shape[1])) for tensor in tensors]
    elif len(shapes) > 1:
        raise InputError(f"{name}: samples differ in shape ({', '.join(map(str, sorted(shapes)))}); resize or pad them")
    return torch.cat(tensors)
