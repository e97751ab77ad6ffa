"""Training of small vision networks on pictures in memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from layerwright.core.errors import InputError
from layerwright.tune._loop import Progress, Schedule, train_

__all__ = ["fit_"]


def fit_(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epochs: int = 20,
    batch: int = 64,
    rate: float | None = None,
    optimizer: Literal["adamw", "sgd"] = "adamw",
    weight_decay: float | None = None,
    warmup: float = 0.05,
    smoothing: float = 0.0,
    clip: float = 1.0,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    loss_fn: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None,
    undecayed: frozenset[str] = frozenset(),
    seed: int = 0,
    name: str = "training",
    progress: Progress | None = None,
) -> list[float]:
    """Train `model` in place, in training mode, and leave it in evaluation mode.

    Every epoch goes through all pictures in a new order that depends on `seed` alone; a last batch that is less than
    half full is left out, since batch norms suffer from it. The rate rises over the first steps and falls to zero
    along a cosine. Weights of two and more dimensions decay.

    Args:
        images: ``(samples, channels, height, width)``.
        labels: ``(samples,)``, or what `loss_fn` takes.
        rate: the highest one; 1e-3 for AdamW and 0.05 for SGD (momentum 0.9) if left out.
        weight_decay: 0.05 for AdamW and 5e-4 for SGD if left out.
        warmup: share of the steps.
        smoothing: of the labels, in [0, 1).
        augment: ``augment(images, generator)`` changes each batch.
        loss_fn: ``loss_fn(model, images, labels)``; cross-entropy of the logits if left out.
        undecayed: names of parameters that do not decay, such as a network's ``no_weight_decay()``.

    Returns:
        The loss of each step.

    Raises:
        InputError: as many labels as pictures are expected; see also `train_`.
    """
    if len(images) != len(labels) or not len(images):
        raise InputError(f"labels: got {len(labels)} for {len(images)} images, expected one for each of at least one")
    draw = torch.Generator().manual_seed(seed)
    batches = [
        chosen
        for _ in range(epochs)
        for chosen in torch.randperm(len(images), generator=draw).split(batch)
        if 2 * len(chosen) >= min(batch, len(images))
    ]
    if not batches:
        raise InputError(f"epochs: got {epochs}, expected at least 1")
    highest = rate or {"adamw": 1e-3, "sgd": 0.05}[optimizer]
    decay = {"adamw": 0.05, "sgd": 5e-4}[optimizer] if weight_decay is None else weight_decay
    schedule = Schedule(len(batches), highest, decay, warmup=warmup, clip=clip, seed=seed)
    rising = round(warmup * len(batches))
    step_number = iter(range(len(batches)))

    def loss(running: nn.Module, number: int) -> Tensor:
        chosen = batches[number]
        pictures, answers = images[chosen], labels[chosen]
        if augment:
            pictures = augment(pictures, draw)
        if loss_fn:
            return loss_fn(running, pictures, answers)
        return functional.cross_entropy(running(pictures).float(), answers, label_smoothing=smoothing)

    def set_rate(running_optimizer: Any, step: int) -> None:
        done = (step - rising) / max(1, len(batches) - rising)
        factor = (step + 1) / (rising + 1) if step < rising else 0.5 * (1 + math.cos(math.pi * done))
        for group in running_optimizer.param_groups:
            group["lr"] = highest * factor

    free = [p for n, p in model.named_parameters() if n in undecayed and p.requires_grad]
    losses = train_(
        model, range(len(batches)), lambda running, _: loss(running, next(step_number)), schedule, name=name,
        progress=progress, distributed=False, training=True, before_step=set_rate,
        parts=[({"weight_decay": 0.0}, free)] if free else (),
        optimizer_of=(lambda groups: torch.optim.SGD(groups, lr=highest, momentum=0.9)) if optimizer == "sgd" else None,
    )  # fmt: skip
    model.eval()
    return losses
