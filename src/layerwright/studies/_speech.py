"""Training and measuring of small transducers on small speech."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from layerwright.data.speech import SpeechSet
from layerwright.models.rnnt import RNNT, RNNTOutput
from layerwright.nn.transducer_loss import transducer_loss
from layerwright.score.token_errors import token_error_rate
from layerwright.train import Eden, ScaledAdam
from layerwright.tune.alpha_divergence import lattice_divergence
from layerwright.tune.supernet import Supernet, sandwich_step

__all__ = ["Training", "error_rate", "label_loss", "lattice_kd", "train_alone_", "train_supernet_"]

KD_WEIGHT = 0.02
"""Of the divergence beside the loss of the labels: it counts every node of the lattice, the loss those on its paths."""


@dataclass(frozen=True)
class Training:
    """How a network is trained.

    Attributes:
        epochs: over the whole set.
        batch_size: utterances.
        optimizer: ``scaled`` with the schedule Eden, or ``adam`` with the same schedule.
        rate: learning rate.
        clip: bound on the norm of the gradient (Adam); ScaledAdam clips by its own median.
        seed: of the order of the batches and of dropout.
    """

    epochs: int
    batch_size: int
    optimizer: Literal["scaled", "adam"]
    rate: float
    clip: float
    seed: int


def label_loss(outputs: RNNTOutput, batch: dict[str, Tensor]) -> Tensor:
    """The transducer loss."""
    return transducer_loss(outputs.logits, batch["targets"], outputs.frame_lengths, batch["target_lengths"])


def lattice_kd(student: RNNTOutput, teacher: RNNTOutput, batch: dict[str, Tensor]) -> Tensor:
    """The divergence of the lattices, brought down to three classes, times `KD_WEIGHT`."""
    targets, lengths = batch["targets"], batch["target_lengths"]
    return KD_WEIGHT * lattice_divergence(student.logits, teacher.logits, targets, student.frame_lengths, lengths)


def train_alone_(
    model: RNNT, data: SpeechSet, how: Training, tell: Callable[[int, int], None] = lambda _d, _t: None
) -> float:
    """Train a network of one size, in place. Returns the forward passes: one a batch."""

    def step(batch: dict[str, Tensor], optimizer: torch.optim.Optimizer, clip: float | None) -> float:
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(label_loss(model(**batch), batch))
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        return 1.0

    return _train_(model, data, how, step, tell)


def train_supernet_(
    supernet: Supernet,
    data: SpeechSet,
    how: Training,
    kd: Callable[[Any, Any, Any], Tensor] | None = lattice_kd,
    label_weight: float = 1.0,
    tell: Callable[[int, int], None] = lambda _d, _t: None,
) -> float:
    """Train all sub-networks by the sandwich rule, in place. Returns the passes in units of the largest network's."""
    generator = torch.Generator().manual_seed(how.seed + 77)

    def step(batch: dict[str, Tensor], optimizer: torch.optim.Optimizer, clip: float | None) -> float:
        settings = {"label_weight": label_weight, "optimizer": optimizer, "clip": clip, "generator": generator}
        return sandwich_step(supernet, batch, label_loss, kd, **settings).passes  # type: ignore[arg-type]

    return _train_(supernet.model, data, how, step, tell)


def _train_(
    model: nn.Module,
    data: SpeechSet,
    how: Training,
    step: Callable[[dict[str, Tensor], torch.optim.Optimizer, float | None], float],
    tell: Callable[[int, int], None],
) -> float:
    parameters = list(model.parameters())
    scaled = how.optimizer == "scaled"
    optimizer: torch.optim.Optimizer = (
        ScaledAdam(parameters, how.rate, clipping_scale=2.0)
        if scaled
        else torch.optim.Adam(parameters, how.rate, betas=(0.9, 0.98))
    )
    per_epoch = -(-len(data) // how.batch_size)
    schedule = Eden(optimizer, batches=4 * per_epoch, epochs=6, warmup_batches=min(20, per_epoch))
    generator = torch.Generator().manual_seed(how.seed)
    passes = 0.0
    model.train()
    with torch.random.fork_rng(devices=[]):  # dropout draws from the global generator
        torch.manual_seed(how.seed)
        for epoch in range(how.epochs):
            for batch in data.batches(how.batch_size, generator):
                passes += step(batch, optimizer, None if scaled else how.clip)
                schedule.step_batch()
            schedule.step_epoch()
            tell(epoch + 1, how.epochs)
    model.eval()
    return passes


def error_rate(model: RNNT, data: SpeechSet, batch_size: int = 200) -> float:
    """Share of wrong labels by greedy decoding, in evaluation mode."""
    training = model.training
    model.eval()
    said: list[Sequence[int]] = []
    for batch in data.batches(batch_size):
        said += model.greedy(batch["features"], batch["feature_lengths"])
    model.train(training)
    return token_error_rate(said, data.labels)
