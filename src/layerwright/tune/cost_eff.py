"""From a classifier to a narrow one with exits: a teaching assistant, pruning step by step, recovery."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from layerwright.allocate.width_schedule import Widths, proportional_widths, width_schedule
from layerwright.core.calibration import Calibration, LossFunction
from layerwright.core.errors import InputError
from layerwright.nn.encoder_exits import MultiExit, encoder_blocks
from layerwright.nn.exit_head import ExitPooling
from layerwright.nn.factorized_embedding import FactorizedEmbedding
from layerwright.score.exit_taylor import UnitScores, exit_taylor
from layerwright.treat.encoder_exits import add_encoder_exits, find_exits
from layerwright.treat.factorize import factorize_embedding
from layerwright.treat.prune_heads import best_units, encoder_widths, prune_heads_, prune_neurons_
from layerwright.tune._loop import Progress, Schedule, opening, restore_flags_, train_, trainable_copy
from layerwright.tune.multi_exit import MultiExitDistillation

__all__ = ["StagedTraining", "cost_eff", "present_widths", "slenderize_", "slenderized", "teaching_assistant"]

Scorer = Callable[[MultiExit, MultiExit, Sequence[Any]], dict[str, UnitScores]]
HARD_ASSISTANT, HARD_SCORES = 0.5, 0.1
"""Share of the labels in the losses of the assistant's training and of the scores; the slender model learns without."""
ASSISTANT_HIDDEN, PERIOD_HIDDEN, RECOVERY_HIDDEN = 1 / 4, 0.7, 0.5
"""Shares of the steps in which the states between blocks alone are distilled."""
PRUNING_RATE, HIDDEN_RATE = 0.5, 1.5
"""Learning rates while pruning, and in recovery on the states alone, over the common one."""


@dataclass(frozen=True)
class StagedTraining:
    """How the stages train: each has its own optimizer and warm-up.

    Attributes:
        data: batches.
        schedule: what the stages share; `steps` and `learning_rate` are replaced.
        progress: ``progress(name, done, total)``.
    """

    data: Calibration
    schedule: Schedule
    progress: Progress | None = None

    def run(
        self,
        student: MultiExit,
        distillation: MultiExitDistillation,
        steps: int,
        name: str,
        *,
        hidden: float = 1.0,
        prediction: float = 1.0,
        hard: float = 0.0,
        rate: float = 1.0,
    ) -> None:
        """Train all of `student`, in place, for so many steps; none is no step."""
        if steps < 1:
            return
        own = self.schedule
        schedule = Schedule(
            steps, rate * own.learning_rate, own.weight_decay, own.warmup, own.batches_per_step, own.clip, own.seed
        )

        def loss_of(network: nn.Module, batch: Any) -> Tensor:
            return distillation.loss(network, batch, hidden=hidden, prediction=prediction, hard=hard)

        train_(student, list(self.data), loss_of, schedule, progress=self.progress, name=name)


def present_widths(model: nn.Module) -> Widths:
    """Heads and neurons of the first block, rank of the word embedding (None where there is no table of words).

    Raises:
        InputError: blocks of unequal widths.
        TypeError: no block that can be pruned.
    """
    heads, parts = encoder_widths(model)
    shapes = {(heads[path].heads, part.neurons) for path, part in parts.items()}
    if len(shapes) > 1:
        raise InputError(f"model: its blocks have unequal widths, heads and neurons {sorted(shapes)}")
    (number, neurons) = next(iter(shapes))
    found = _embedding(model)
    if found is None:
        return Widths(number, neurons)
    embedding = found[2]
    rank = embedding.rank if isinstance(embedding, FactorizedEmbedding) else min(embedding.weight.shape)
    return Widths(number, neurons, rank)


def slenderize_(model: nn.Module, scores: dict[str, UnitScores], widths: Widths) -> None:
    """Prune every block to `widths` by `scores`, and factorize the word embedding, in place.

    Args:
        model: changed; its tensors are not written to.
        scores: of `exit_taylor`, by the paths of this model.
        widths: at most what there is.

    Raises:
        InputError: a width outside its range, or a block without scores.
    """
    heads, _ = encoder_widths(model)
    for path in heads:
        if path not in scores:
            raise InputError(f"scores: none for block {path}; score this model, as it is now")
        own = scores[path]
        prune_heads_(model, encoder_widths(model)[0][path], best_units(own.heads, widths.heads, "heads"))
        prune_neurons_(model, encoder_widths(model)[1][path], best_units(own.neurons, widths.neurons, "neurons"))
    found = _embedding(model)
    if widths.rank is not None and found is not None:
        owner, name, embedding = found
        setattr(owner, name, factorize_embedding(embedding, widths.rank))


def teaching_assistant(
    model: nn.Module,
    teacher: nn.Module,
    training: StagedTraining,
    steps: int,
    *,
    blocks: Sequence[int] | None = None,
    pooling: ExitPooling = "cls",
    dense: bool = False,
    equalize: bool = True,
    seed: int = 0,
) -> MultiExit:
    """A copy of `model` with exits that all learned from the teacher's one output (stage 2 of COST-EFF).

    Where `model` is not itself the teacher, a quarter of the steps brings the states between its blocks to the
    teacher's first; else these are the same already.
    """
    exits = find_exits(model) or add_encoder_exits(
        model, blocks, pooling=pooling, dense=dense, equalize=equalize, seed=seed
    )
    assistant = MultiExit(trainable_copy(exits.model, lambda _name, _tensor: True))
    distillation = MultiExitDistillation(teacher, "final")
    distillation.check(assistant)
    first = 0 if teacher is model else round(ASSISTANT_HIDDEN * steps)
    training.run(assistant, distillation, first, "assistant, states", prediction=0.0)
    training.run(assistant, distillation, steps - first, "assistant", hidden=0.0, hard=HARD_ASSISTANT)
    return assistant


def slenderized(
    assistant: MultiExit,
    training: StagedTraining,
    path: Iterable[Widths],
    *,
    period: int,
    recovery: int,
    score_batches: int | None = None,
    scorer: Scorer | None = None,
) -> MultiExit:
    """A copy of `assistant`, pruned step by step along `path`, each of its exits taught by the assistant's own.

    Before each step all heads and neurons are scored with the loss of all exits and states; `period` steps of training
    follow, the first 70 % of them on the states between blocks alone. Then `recovery` steps, half of them on the states
    (stages 3 and 4 of COST-EFF).

    Args:
        assistant: left as it is.
        training: data and schedule.
        path: widths after each step.
        period: training steps after each pruning step, 0 or more.
        recovery: training steps at the end, 0 or more.
        score_batches: batches for the scores; None for all.
        scorer: ``scorer(student, assistant, batches)``; None scores by all exits and states.
    """
    student = MultiExit(trainable_copy(assistant.model, lambda _name, _tensor: True))
    distillation = MultiExitDistillation(assistant, "exit")
    batches = list(training.data)[:score_batches]

    for widths in path:
        scores = (scorer or _all_exits)(student, assistant, batches)
        slenderize_(student, scores, widths)
        first = round(PERIOD_HIDDEN * period)
        name = f"{widths.heads} heads, {widths.neurons} neurons"
        training.run(student, distillation, first, name, prediction=0.0, rate=PRUNING_RATE)
        training.run(student, distillation, period - first, name, rate=PRUNING_RATE)
    first = round(RECOVERY_HIDDEN * recovery)
    training.run(student, distillation, first, "recovery, states", prediction=0.0, rate=HIDDEN_RATE)
    training.run(student, distillation, recovery - first, "recovery")
    return student


def _all_exits(student: MultiExit, assistant: MultiExit, batches: Sequence[Any]) -> dict[str, UnitScores]:
    distillation = MultiExitDistillation(assistant, "exit")

    def loss(network: nn.Module, batch: Any) -> Tensor:
        return distillation.loss(network, batch, hard=HARD_SCORES if _labelled(batch) else 0.0)

    return exit_taylor(student, batches, loss)


def cost_eff(
    model: nn.Module,
    calibration: Calibration | Any,
    *,
    teacher: nn.Module | None = None,
    loss_fn: LossFunction | None = None,
    seed: int = 0,
    heads: int | None = None,
    neurons: int | None = None,
    embedding_rank: int | None = None,
    pruning_steps: int | None = None,
    blocks: Sequence[int] | None = None,
    pooling: ExitPooling = "cls",
    dense: bool = False,
    equalize: bool = True,
    score_batches: int | None = None,
    steps: int = 300,
    learning_rate: float = 2e-5,
    weight_decay: float = 0.01,
    warmup: float = 0.1,
    batches_per_step: int = 1,
    clip: float = 1.0,
    progress: Progress | None = None,
) -> nn.Module:
    """A narrow copy of a classifier with an exit after each block (Shen et al., 2022, COST-EFF, arXiv 2210.15523).

    A quarter of `steps` trains a teaching assistant (the model with exits), half goes into pruning it step by step with
    training in between, a quarter into recovery. The depth stays. The result is a model as before whose
    ``find_exits(model)`` is the `MultiExit` with `predict`; saved and loaded it keeps widths and exits. Memory: the teacher,
    the assistant and four times the student in float32.

    Args:
        model: an encoder classifier (BERT, RoBERTa, DistilBERT, ViT, ...), left untouched. Without `teacher` it must be
            fine-tuned; with one it may be the pretrained model. It may have exits already.
        calibration: training batches with labels.
        teacher: the fine-tuned classifier; None takes `model`.
        loss_fn: not used: the labels must be classes.
        seed: of new heads and of the order of the batches.
        heads: attention heads of each block in the end; None for half.
        neurons: of each feed-forward part; None for the same share as the heads.
        embedding_rank: of the word embedding; None for the same share.
        pruning_steps: None removes one head per step.
        blocks, pooling, dense, equalize: of the exits, see `add_encoder_exits`.
        score_batches: batches for each scoring; None for all.
        steps, learning_rate, weight_decay, warmup, batches_per_step, clip: see `Schedule`; of all stages together. While
            pruning half of the rate is used, and one and a half in recovery on the states alone.
        progress: ``progress(name, done, total)``.

    Raises:
        InputError: a width that is larger than the present one or below 1, fewer steps than stages, no labels, or a
            teacher whose depth the model's does not divide.
        TypeError: no such classifier.
    """
    data, schedule = opening(
        calibration, loss_fn, steps, learning_rate, weight_decay, warmup, batches_per_step, clip, seed
    )
    encoder_blocks(model)
    if not _labelled(next(iter(data))):
        raise InputError("labels: cost_eff trains a classifier: give batches with labels, or (inputs, labels) pairs")
    path = _path(present_widths(model), heads, neurons, embedding_rank, pruning_steps)
    if steps < 2 * len(path) + 4:
        raise InputError(f"steps: got {steps}, expected at least {2 * len(path) + 4} for {len(path)} pruning steps")
    assistant_steps = steps // 4
    period = steps // 2 // len(path)
    training = StagedTraining(data, schedule, progress)
    assistant = teaching_assistant(
        model,
        model if teacher is None else teacher,
        training,
        assistant_steps,
        blocks=blocks,
        pooling=pooling,
        dense=dense,
        equalize=equalize,
        seed=seed,
    )
    recovery = steps - assistant_steps - period * len(path)
    student = slenderized(assistant, training, path, period=period, recovery=recovery, score_batches=score_batches)
    restore_flags_(student.model, model)
    return student.model


def _path(
    full: Widths, heads: int | None, neurons: int | None, rank: int | None, pruning_steps: int | None
) -> list[Widths]:
    target = proportional_widths(full, max(1, full.heads // 2) if heads is None else heads)
    chosen = Widths(target.heads, target.neurons if neurons is None else neurons, target.rank if rank is None else rank)
    return width_schedule(full, chosen, pruning_steps)


def _embedding(model: nn.Module) -> tuple[nn.Module, str, Any] | None:
    """Where the table of words stands: its owner, its name there, and itself; None where there is none."""
    inner: Any = model.model if isinstance(model, MultiExit) else model
    getter = getattr(inner, "get_input_embeddings", None)
    try:
        table = getter() if callable(getter) else None
    except NotImplementedError:
        table = None
    if not isinstance(table, nn.Embedding | FactorizedEmbedding) or math.prod(table.weight.shape) == 0:
        return None
    for owner in inner.modules():
        for name, child in owner._modules.items():
            if child is table:
                return owner, name, table
    return None


def _labelled(batch: Any) -> bool:
    if isinstance(batch, Mapping):
        return isinstance(batch.get("labels"), Tensor)
    return isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[1], Tensor)
