"""SubTuning, the whole job: profile the blocks, choose some one after the other, train them and a new readout."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layerwright.allocate.greedy_blocks import BlockChoice, check_greedy, greedy_blocks
from layerwright.allocate.subset_evaluations import SubsetEvaluations
from layerwright.core.block_paths import check_block_paths
from layerwright.core.blocks import find_blocks
from layerwright.core.calibration import Calibration, LossFunction
from layerwright.core.errors import InputError
from layerwright.core.fingerprint import fingerprint_model
from layerwright.core.processes import main_process
from layerwright.core.readout import find_readout
from layerwright.data.folds import stratified_folds
from layerwright.score.finetuning_profile import FinetuningProfile, profile_windows
from layerwright.tune._loop import Progress, opening, restore_flags_
from layerwright.tune._samples import Samples
from layerwright.tune.subset_trainer import SubsetTrainer

__all__ = ["SubTuned", "choose_and_train", "subtuning"]


@dataclass(frozen=True)
class SubTuned:
    """What SubTuning made.

    Attributes:
        model: trained on all samples, in evaluation mode.
        profile: accuracy of each window of blocks alone, by cross-validation.
        choice: the chosen blocks, with the trace of the search.
        head: path of the new readout.
        trained: parameters that were trained, the readout's included.
    """

    model: nn.Module
    profile: FinetuningProfile
    choice: BlockChoice
    head: str
    trained: int


def subtuning(
    model: nn.Module,
    calibration: Calibration | Any,
    *,
    teacher: nn.Module | None = None,
    loss_fn: LossFunction | None = None,
    seed: int = 0,
    blocks: str | Sequence[str] | None = None,
    head: str | None = None,
    classes: int | Sequence[str] | None = None,
    window: int = 1,
    folds: int = 5,
    repeats: int = 1,
    eps: float = 0.002,
    max_blocks: int | None = None,
    head_rate: float = 10.0,
    freeze_norm: bool = True,
    cache: bool = True,
    parallel: int = 1,
    record: str | Path | None = None,
    steps: int = 100,
    search_steps: int | None = None,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.0,
    warmup: float = 0.05,
    clip: float = 1.0,
    progress: Progress | None = None,
) -> nn.Module:
    """A copy of `model` with a new readout and a few chosen blocks trained: the model that `choose_and_train` makes.

    Args:
        model: left untouched.
        calibration: batches with one class for each sample.
        teacher: not used; every tuner takes one.

    The settings, and what is raised, are those of `choose_and_train`.
    """
    del teacher
    return choose_and_train(
        model,
        calibration,
        loss_fn=loss_fn,
        seed=seed,
        blocks=blocks,
        head=head,
        classes=classes,
        window=window,
        folds=folds,
        repeats=repeats,
        eps=eps,
        max_blocks=max_blocks,
        head_rate=head_rate,
        freeze_norm=freeze_norm,
        cache=cache,
        parallel=parallel,
        record=record,
        steps=steps,
        search_steps=search_steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        warmup=warmup,
        clip=clip,
        progress=progress,
    ).model


def choose_and_train(
    model: nn.Module,
    calibration: Calibration | Any,
    *,
    loss_fn: LossFunction | None = None,
    seed: int = 0,
    blocks: str | Sequence[str] | None = None,
    head: str | None = None,
    classes: int | Sequence[str] | None = None,
    window: int = 1,
    folds: int = 5,
    repeats: int = 1,
    eps: float = 0.002,
    max_blocks: int | None = None,
    head_rate: float = 10.0,
    freeze_norm: bool = True,
    cache: bool = True,
    parallel: int = 1,
    record: str | Path | None = None,
    steps: int = 100,
    search_steps: int | None = None,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.0,
    warmup: float = 0.05,
    clip: float = 1.0,
    progress: Progress | None = None,
) -> SubTuned:
    """Profile the blocks of a classifier, choose some greedily, and train them with a new readout (Kaplun et al., 2023).

    Every evaluation starts from the pretrained weights and the same readout, trains one set of blocks on the training
    part of each fold and judges it on the rest; all else is frozen, its batch norms included. Time: about
    ``blocks * (chosen + 1) * folds * repeats`` trainings, of which the frozen prefix runs once in all.
    Source: Less is More: Selective Layer Finetuning with SubTuning, arXiv 2302.06354.

    Args:
        model: left untouched.
        calibration: batches ``(inputs, labels)`` or mappings with ``labels``, one class for each sample.
        loss_fn: ``loss_fn(model, batch) -> scalar``; None for cross-entropy.
        seed: of folds, readout and order of samples.
        blocks: paths of the units, or of the list that holds them; None finds them. Parts of blocks can be units.
        head: path of the readout; None finds it.
        classes: of the new readout, or their names; None takes what the labels reach.
        window: blocks that are trained together in the profile.
        folds: of the cross-validation, at least 2, at most the samples of the smallest class.
        repeats: seeds for each evaluation.
        eps: a block is taken if it raises the accuracy by more.
        max_blocks: how many at most; None for no limit.
        head_rate: the readout learns at so many times the rate: it begins anew, and a short training at the common rate
            leaves it behind, so that the readout alone would look worse than it is.
        freeze_norm: norm layers of frozen blocks stay frozen.
        cache: keep the features before the first trained block.
        parallel: processes of one thread each; the result does not depend on it.
        record: JSON file, written after each evaluation; with the same settings a run that was stopped goes on from it.
        steps: of the final training.
        search_steps: of the trainings that are only judged; None for `steps`.
        batch_size: samples in a step.
        learning_rate, weight_decay, warmup, clip: see `Schedule`.
        progress: ``progress(name, done, total)``; the name shows the accuracies as they come.

    Raises:
        InputError: a setting outside its range, unknown or overlapping blocks, labels that are not one class for each
            sample, or a record of another run.
    """
    data, schedule = opening(
        calibration, loss_fn, search_steps or steps, learning_rate, weight_decay, warmup, 1, clip, seed
    )
    if steps < 1 or (search_steps is not None and search_steps < 1) or repeats < 1:
        raise InputError(f"steps, search_steps, repeats: got {steps}, {search_steps}, {repeats}, expected at least 1")
    check_greedy(eps, max_blocks)
    readout = find_readout(model, head)
    units = _units(model, blocks, readout)
    samples = Samples.of(data)
    names = None if classes is None or isinstance(classes, int) else tuple(classes)
    number = len(names) if names else classes if isinstance(classes, int) else max(samples.classes, 2)
    windows = profile_windows(units, window)
    trainer = SubsetTrainer(
        model,
        data,
        samples,
        readout,
        number,
        stratified_folds(samples.labels, folds, seed),
        schedule,
        batch_size,
        tuple(range(seed, seed + repeats)),
        head_rate,
        freeze_norm,
        cache,
    )
    costs = {unit: float(sum(p.numel() for p in model.get_submodule(unit).parameters())) for unit in units}
    key = _key(model, trainer, units, data) | {"folds": folds, "seed": seed}
    path = record if main_process() else None
    with SubsetEvaluations(trainer, units, path=path, key=key, workers=parallel, progress=progress) as evaluations:
        profile = FinetuningProfile.from_runs(
            dict(zip(windows, evaluations.runs([(), *windows], "profile, ")[1:], strict=True))
        )
        evaluations.write(profile=profile.to_data())
        choice = greedy_blocks(evaluations, units, eps=eps, max_blocks=max_blocks, costs=costs)
        evaluations.write(**choice.to_data(), eps=eps, max_blocks=max_blocks)
    tuned = trainer.train(choice.keep, seed=seed, steps=steps, progress=progress)
    trained = sum(p.numel() for p in tuned.get_submodule(readout).parameters()) + sum(costs[u] for u in choice.keep)
    restore_flags_(tuned, model)
    _set_classes_(tuned, number, names)
    return SubTuned(tuned.eval(), profile, choice, readout, int(trained))


def _units(model: nn.Module, blocks: str | Sequence[str] | None, head: str) -> tuple[str, ...]:
    """The blocks to choose from, in order, checked."""
    if blocks is None or isinstance(blocks, str):
        found = tuple(name for stack in find_blocks(model, blocks) for name in stack.names)
    else:
        found = check_block_paths(blocks, model)
    units = check_block_paths(tuple(name for name in found if name != head), model)
    check_block_paths((*units, head), model)
    if not units:
        raise InputError("blocks: got none, expected at least one")
    return units


def _key(model: nn.Module, trainer: SubsetTrainer, units: Sequence[str], data: Calibration) -> dict[str, Any]:
    """All that the figures depend on, for the record."""
    schedule = dataclasses.asdict(trainer.schedule)
    return {
        "model": fingerprint_model(model),
        "data": data.fingerprint(),
        "units": list(units),
        "head": trainer.head,
        "classes": trainer.classes,
        "batch_size": trainer.batch_size,
        "seeds": list(trainer.seeds),
        "head_rate": trainer.head_rate,
        "freeze_norm": trainer.freeze_norm,
        "dtype": str(next((p.dtype for p in model.parameters()), torch.float32)),
        **{f"schedule.{name}": value for name, value in schedule.items()},
    }


def _set_classes_(model: nn.Module, classes: int, names: Sequence[str] | None) -> None:
    """Let the configuration of a Hugging Face model say what the new readout gives."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "id2label"):
        return
    if names is None and len(config.id2label or ()) == classes:
        return
    labels = list(names) if names else [str(number) for number in range(classes)]
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: number for number, label in enumerate(labels)}
    if hasattr(model, "num_labels"):
        model.num_labels = classes  # type: ignore[assignment]
