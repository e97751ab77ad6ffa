"""Folds of a data set in which every class is split evenly."""

from __future__ import annotations

import torch
from torch import Tensor

from layerwright.core.errors import InputError

__all__ = ["stratified_folds"]


def stratified_folds(labels: Tensor, folds: int = 5, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """``(positions to train on, positions to judge by)`` for each fold; each sample is judged by once.

    Args:
        labels: classes ``(samples,)``; each class is shuffled and dealt out over the folds in turn.
        folds: at least 2, at most the samples of the smallest class.
        seed: of the shuffle.

    Raises:
        InputError: `folds` outside its range, or labels that are not one whole number a sample.
    """
    if labels.dim() != 1 or labels.is_floating_point() or not len(labels):
        raise InputError(f"labels: got shape {tuple(labels.shape)}, {labels.dtype}, expected one class a sample")
    if folds < 2:
        raise InputError(f"folds: got {folds}, expected at least 2")
    labels = labels.cpu()
    classes, counts = labels.unique(return_counts=True)
    if folds > int(counts.min()):
        least = int(counts.argmin())
        raise InputError(
            f"folds: got {folds}, and class {int(classes[least])} has {int(counts[least])} samples; "
            f"use at most {int(counts[least])}, or give more samples"
        )
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(labels), generator=generator)
    dealt = shuffled[torch.argsort(labels[shuffled], stable=True)]  # class after class, so that turns stay even
    fold_of = torch.empty(len(labels), dtype=torch.long)
    fold_of[dealt] = torch.arange(len(labels)) % folds
    return [((fold_of != fold).nonzero()[:, 0], (fold_of == fold).nonzero()[:, 0]) for fold in range(folds)]
