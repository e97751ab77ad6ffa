"""The accuracy of a model after training a set of blocks and a new readout: what SubTuning evaluates."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from layerwright.core.calibration import Calibration, evaluating, logits_of
from layerwright.core.errors import InputError
from layerwright.core.readout import new_readout
from layerwright.tune._loop import Progress, Schedule
from layerwright.tune._samples import Samples, index_batches
from layerwright.tune.feature_cache import FeatureCache, Prefix
from layerwright.tune.subtune import subset_copy, train_subset_

__all__ = ["SubsetTrainer"]

Fold = tuple[Tensor, Tensor]
_ROWS = 256


@dataclass
class SubsetTrainer:
    """Trains sets of blocks of one model, each from the same weights with the same new readout.

    ``trainer(blocks)`` gives the accuracy on every fold, for every seed. It does not depend on what was called before,
    and on a CPU it uses one thread, so that every process finds the same figures. What comes before the first trained
    block is computed once for all calls, where `cache` allows.

    Attributes:
        model: pretrained; never changed.
        data: how batches are fed, and the loss if it has one of its own.
        samples: of `data`.
        head: path of the readout that is replaced.
        classes: of the new readout.
        folds: positions to train on and to judge by.
        schedule: steps and rates of one training.
        batch_size: samples in a step.
        seeds: of the order of the samples and of the readout.
        head_rate: the readout learns at so many times the rate.
        freeze_norm: see `subtune`.
        cache: keep features of the frozen prefix, at most `max_bytes` of them.
        max_bytes: of kept features.
    """

    model: nn.Module
    data: Calibration
    samples: Samples
    head: str
    classes: int
    folds: Sequence[Fold]
    schedule: Schedule = field(default_factory=Schedule)
    batch_size: int = 32
    seeds: Sequence[int] = (0,)
    head_rate: float = 1.0
    freeze_norm: bool = True
    cache: bool = True
    max_bytes: float = 2e9
    _features: FeatureCache | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise InputError(f"batch_size: got {self.batch_size}, expected at least 1")
        if not self.head_rate > 0:
            raise InputError(f"head_rate: got {self.head_rate}, expected above 0")
        if self.samples.classes > self.classes:
            raise InputError(f"classes: got {self.classes}, and labels reach up to {self.samples.classes - 1}")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_features": None}

    def __call__(self, blocks: Sequence[str]) -> tuple[float, ...]:
        """Accuracies after training `blocks` and the readout, seed after seed, fold after fold."""
        found = []
        for seed in self.seeds:
            for fitted, judged in self.folds:
                trained = self.train(blocks, fitted, seed)
                found.append(self.accuracy(trained, judged, blocks))
        return tuple(found)

    def start(self, blocks: Sequence[str], seed: int = 0) -> nn.Module:
        """A copy that owns the tensors of `blocks` and has a new readout, in evaluation mode."""
        copy = subset_copy(self.model, blocks)
        old = copy.get_submodule(self.head)
        assert isinstance(old, nn.Linear)
        copy.set_submodule(self.head, new_readout(old, self.classes, seed))
        return copy.eval()

    def train(
        self,
        blocks: Sequence[str],
        positions: Tensor | None = None,
        seed: int = 0,
        steps: int | None = None,
        progress: Progress | None = None,
    ) -> nn.Module:
        """A copy of the model after training `blocks` and the readout on the samples at `positions`, None for all."""
        places = torch.arange(len(self.samples)) if positions is None else positions
        schedule = dataclasses.replace(self.schedule, seed=seed, steps=steps or self.schedule.steps)
        copy = self.start(blocks, seed)
        with _one_thread(self.samples.labels.device):
            prefix = self.prefix(blocks)
            train_subset_(
                copy,
                blocks,
                self.head,
                index_batches(places, self.batch_size, schedule.steps * schedule.batches_per_step, seed),
                lambda network, index: self.loss(network, index, prefix),
                schedule,
                freeze_norm=self.freeze_norm,
                head_rate=self.head_rate,
                progress=progress,
            )
        return copy

    def loss(self, network: nn.Module, index: Tensor, prefix: Prefix | None = None) -> Tensor:
        """The loss on the samples at `index`: the data's own, or cross-entropy."""
        batch = self.samples.take(index)
        with _running(prefix, network, index):
            if self.data.loss_fn is not None:
                return self.data.loss_fn(network, batch)
            logits = logits_of(self.data.forward(network, batch)).float()
        return nn.functional.cross_entropy(logits, self.samples.labels[index.to(self.samples.labels.device)])

    @torch.no_grad()
    def accuracy(self, network: nn.Module, positions: Tensor, blocks: Sequence[str] = ()) -> float:
        """Share of the samples at `positions` whose class `network` finds, a model trained on `blocks`."""
        right = 0
        with evaluating(network), _one_thread(self.samples.labels.device):
            prefix = self.prefix(blocks)
            for index in positions.split(_ROWS):
                with _running(prefix, network, index):
                    logits = logits_of(self.data.forward(network, self.samples.take(index)))
                answers = self.samples.labels[index.to(self.samples.labels.device)]
                right += int((logits.argmax(-1) == answers).sum())
        return right / len(positions)

    def prefix(self, blocks: Sequence[str]) -> Prefix | None:
        """Features of what is frozen before `blocks` and the readout; None where they are not kept."""
        if not self.cache or not self.freeze_norm:
            return None
        if self._features is None:
            self._features = FeatureCache(
                self.model, self._forward, len(self.samples), batch_size=_ROWS, max_bytes=self.max_bytes
            )
        return self._features.prefix([*blocks, self.head])

    def _forward(self, network: nn.Module, index: Tensor) -> Any:
        return self.data.forward(network, self.samples.take(index))


def _running(prefix: Prefix | None, network: nn.Module, index: Tensor) -> Any:
    return nullcontext() if prefix is None else prefix.running(network, index)


@contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """Context: on a CPU one thread, so that sums are rounded alike in every process."""
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
