"""The fine-tuning profile: how well a model does when one block and a new readout are trained (SubTuning)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from layerwright.core.block_paths import check_block_paths
from layerwright.core.errors import InputError

__all__ = ["FinetuningProfile", "finetuning_profile", "profile_windows"]

Progress = Callable[[str, int, int], None]
Train = Callable[[nn.Module, tuple[str, ...], int, int], nn.Module | None]
"""``train_fn(model, chosen, fold, seed)``: trains those blocks of `model`; returns what to judge, None for `model`."""
Judge = Callable[[nn.Module, int], float]
"""``eval_fn(trained, fold)``: accuracy on the fold's other samples; higher is better."""


@dataclass(frozen=True)
class FinetuningProfile:
    """Accuracy after training one window of blocks, for each window.

    Attributes:
        names: the blocks of each window, in the model's order.
        accuracy: mean over folds and seeds.
        std: standard deviation over folds and seeds, 0 for a single run.
    """

    names: tuple[tuple[str, ...], ...]
    accuracy: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_runs(cls, runs: Mapping[tuple[str, ...], Sequence[float]]) -> FinetuningProfile:
        """From the accuracies of all runs by window."""
        means = tuple(statistics.fmean(values) for values in runs.values())
        return cls(tuple(runs), means, tuple(statistics.pstdev(values) for values in runs.values()))

    def best(self) -> tuple[str, ...]:
        """The window of the highest accuracy, the first of equal ones."""
        return self.names[self.accuracy.index(max(self.accuracy))]

    def __len__(self) -> int:
        return len(self.names)

    def __str__(self) -> str:
        width = max(len(" + ".join(window)) for window in self.names)
        rows = zip(self.names, self.accuracy, self.std, strict=True)
        return "\n".join(
            f"{' + '.join(window):{width}}  {accuracy:6.1%} ± {std:5.1%}  {'#' * round(40 * max(accuracy, 0.0))}"
            for window, accuracy, std in rows
        )

    def to_data(self) -> list[dict[str, Any]]:
        """Plain data for JSON, a row for each window."""
        rows = zip(self.names, self.accuracy, self.std, strict=True)
        return [{"blocks": list(window), "accuracy": accuracy, "std": std} for window, accuracy, std in rows]


def profile_windows(blocks: Sequence[str], window: int = 1) -> tuple[tuple[str, ...], ...]:
    """All runs of `window` consecutive blocks.

    Raises:
        InputError: `window` below 1 or above the number of blocks.
    """
    if not 1 <= window <= len(blocks):
        raise InputError(f"window: got {window}, expected 1 to {len(blocks)} (the blocks)")
    return tuple(tuple(blocks[start : start + window]) for start in range(len(blocks) - window + 1))


def finetuning_profile(
    model: nn.Module,
    blocks: Sequence[str],
    train_fn: Train,
    eval_fn: Judge,
    window: int = 1,
    folds: int = 5,
    seeds: Sequence[int] = (0,),
    progress: Progress | None = None,
) -> FinetuningProfile:
    """Train each window of blocks on its own, from the same weights, and judge it (Kaplun et al., 2023, arXiv 2302.06354).

    The shape depends on the task: the best block need not be the last, nor the largest. `train_fn` may train `model`
    in place and exchange modules of it: all weights, buffers, flags and modes are put back after every run, also
    after an exception, so that no figure depends on the order. Memory: one more copy of the weights.

    Args:
        model: a trained model; as before afterwards.
        blocks: paths of the units, in order; none inside another.
        train_fn: ``train_fn(model, chosen, fold, seed)``; what it returns is judged, or `model` if that is None.
        eval_fn: ``eval_fn(trained, fold)``: accuracy; higher is better.
        window: consecutive blocks that are trained together.
        folds: parts of a cross-validation, at least 2; `train_fn` and `eval_fn` split their data (`stratified_folds`).
        seeds: each gives a run for every fold.
        progress: ``progress(window and its accuracy, done, total)``.

    Raises:
        InputError: blocks that are unknown or overlap, fewer than two folds, no seeds, or an accuracy that is NaN.
    """
    paths = check_block_paths(blocks, model)
    if folds < 2:
        raise InputError(f"folds: got {folds}, expected at least 2")
    if not seeds:
        raise InputError("seeds: got none, expected at least one")
    windows = profile_windows(paths, window)
    before = _Snapshot(model)
    runs: dict[tuple[str, ...], list[float]] = {}
    for number, chosen in enumerate(windows):
        values = []
        for seed in seeds:
            for fold in range(folds):
                try:
                    trained = train_fn(model, chosen, fold, seed)
                    values.append(float(eval_fn(model if trained is None else trained, fold)))
                finally:
                    before.restore_()
        if any(math.isnan(value) for value in values):
            raise InputError(f"eval_fn: gave NaN for {' + '.join(chosen)}; did the training diverge?")
        runs[chosen] = values
        if progress:
            progress(f"{' + '.join(chosen)}: {statistics.fmean(values):.1%}", number + 1, len(windows))
    return FinetuningProfile.from_runs(runs)


class _Snapshot:
    """All that training can change in a model, to be put back."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = [(m, m.training, dict(m._modules)) for m in model.modules()]
        self._slots = [(m, dict(m._parameters), dict(m._buffers)) for m in model.modules()]
        tensors = [t for _, own, buffers in self._slots for t in (*own.values(), *buffers.values()) if t is not None]
        self._values = {id(t): (t, t.detach().clone(), t.requires_grad, t.grad) for t in tensors}

    @torch.no_grad()
    def restore_(self) -> None:
        """Everything as it was."""
        for module, training, children in self._modules:
            module.training = training
            _put_back(module._modules, children)
        for module, parameters, buffers in self._slots:
            _put_back(module._parameters, parameters)
            _put_back(module._buffers, buffers)
        for tensor, value, wanted, gradient in self._values.values():
            tensor.copy_(value)
            if tensor.is_leaf:
                tensor.requires_grad_(wanted)
                tensor.grad = gradient


def _put_back(now: dict[str, Any], before: Mapping[str, Any]) -> None:
    now.clear()
    now.update(before)
