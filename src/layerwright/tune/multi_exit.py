"""Distillation of a classifier with exits: states between the blocks, and predictions of every exit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwright.core.calibration import evaluating
from layerwright.core.errors import InputError, unknown_name
from layerwright.nn.encoder_exits import MultiExit

__all__ = ["ExitPairing", "MultiExitDistillation", "hidden_loss", "prediction_loss"]

ExitPairing = Literal["final", "exit"]


def hidden_loss(states: Sequence[Tensor], goals: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
    """Distance of states that ignores padding: ``sum_j mean_samples (sum_tokens mean_features (h - g)^2) / length``.

    Args:
        states: of the student, ``(batch, tokens, hidden)`` each.
        goals: as many of the teacher.
        mask: ``(batch, tokens)``, 0 for padding; None counts all tokens.

    Returns:
        A float32 scalar.

    Raises:
        InputError: the numbers or shapes differ.
    """
    if len(states) != len(goals):
        raise InputError(f"teacher: got {len(goals)} hidden states for the student's {len(states)}")
    total = states[0].new_zeros((), dtype=torch.float32)
    for state, goal in zip(states, goals, strict=True):
        if state.shape != goal.shape:
            raise InputError(
                f"teacher: its states have shape {tuple(goal.shape)}, the student's {tuple(state.shape)}; the hidden "
                "size must be the same"
            )
        distance = (state.float() - goal.float()).square().mean(-1)
        if mask is None:
            total = total + distance.mean()
        else:
            kept = mask.to(distance.device).bool()
            rows = distance.masked_fill(~kept, 0.0).sum(1) / kept.sum(1).clamp(min=1)
            total = total + rows.mean()
    return total


def prediction_loss(
    logits: Sequence[Tensor], goals: Sequence[Tensor], labels: Tensor | None = None, hard: float = 0.0
) -> Tensor:
    """Cross-entropy against the teacher's probabilities and against labels, summed over exits.

    ``(1 - hard) * sum CE(softmax(goal), logits) + hard * sum CE(labels, logits)``; temperature 1, mean over samples.

    Args:
        logits: of each exit of the student, ``(batch, classes)``.
        goals: the teacher's for each exit.
        labels: classes ``(batch,)``; needed where `hard` is above 0.
        hard: 0 to 1.

    Raises:
        InputError: `hard` outside its range, labels that are missing, or shapes that differ.
    """
    if not 0 <= hard <= 1:
        raise InputError(f"hard: got {hard}, expected 0 to 1")
    if hard and labels is None:
        raise InputError("labels: a share of hard labels needs batches with labels")
    total = logits[0].new_zeros((), dtype=torch.float32)
    for own, goal in zip(logits, goals, strict=True):
        if own.shape != goal.shape:
            raise InputError(f"teacher: its logits are {tuple(goal.shape)}, the student's {tuple(own.shape)}")
        if hard < 1:
            total = total + (1 - hard) * F.cross_entropy(own.float(), goal.float().softmax(-1))
        if hard:
            assert labels is not None
            total = total + hard * F.cross_entropy(own.float(), labels)
    return total


class MultiExitDistillation:
    """The loss of a student with exits against a teacher (Shen et al., 2022, COST-EFF, arXiv 2210.15523).

    Args:
        teacher: a classifier, or a `MultiExit`; it runs in evaluation mode and without gradients, and is left as it is.
        pairing: ``final``: every exit learns from the teacher's last output; ``exit``: each from the teacher's exit at
            the same share of the depth.

    Raises:
        InputError: an unknown pairing.
        TypeError: the teacher is no encoder classifier.
    """

    def __init__(self, teacher: nn.Module, pairing: ExitPairing = "final") -> None:
        if pairing not in get_args(ExitPairing):
            raise unknown_name("pairing", str(pairing), get_args(ExitPairing))
        self.teacher = teacher if isinstance(teacher, MultiExit) else MultiExit(teacher)
        self.pairing = pairing

    def check(self, student: MultiExit) -> None:
        """Whether the teacher can teach `student`.

        Raises:
            InputError: the teacher's number of blocks is no multiple of the student's, or an exit has no partner.
        """
        if self.teacher.depth % student.depth:
            raise InputError(
                f"teacher: its {self.teacher.depth} blocks are no multiple of the student's {student.depth}; "
                "choose depths that divide"
            )
        if self.pairing == "exit":
            self._partners(student)

    def _partners(self, student: MultiExit) -> list[int]:
        """Which of the teacher's exits each of the student's learns from."""
        if self.pairing == "final":
            return [-1] * len(student.positions)
        step = self.teacher.depth // student.depth
        wanted = [position * step for position in student.positions]
        missing = [position for position in wanted if position not in self.teacher.positions]
        if missing:
            raise InputError(
                f"teacher: it has exits after blocks {', '.join(map(str, self.teacher.positions))}, none after "
                f"{missing[0]}; use pairing='final'"
            )
        return [self.teacher.positions.index(position) for position in wanted]

    def loss(
        self,
        student: nn.Module,
        batch: Any,
        *,
        hidden: float = 1.0,
        prediction: float = 1.0,
        hard: float = 0.0,
    ) -> Tensor:
        """``hidden * hidden_loss + prediction * prediction_loss`` of one batch.

        Args:
            student: a `MultiExit` (or a wrapper for several processes around one).
            batch: see `MultiExit.inputs_of`.
            hidden, prediction: weights, 0 or more; what has weight 0 is not computed.
            hard: share of the labels in the predictions, 0 to 1.

        Raises:
            InputError: see `check`, `hidden_loss` and `prediction_loss`.
        """
        inner = student if isinstance(student, MultiExit) else student.module
        assert isinstance(inner, MultiExit)
        self.check(inner)
        inputs, labels = self.teacher.inputs_of(batch)
        with torch.no_grad(), evaluating(self.teacher):
            goal = self.teacher(**inputs)
        out = student(**inputs)
        total = out.logits.new_zeros((), dtype=torch.float32)
        if hidden:
            step = self.teacher.depth // inner.depth
            mask = inputs.get("attention_mask")
            total = total + hidden * hidden_loss(out.hidden_states, goal.hidden_states[::step], mask)
        if prediction:
            goals = [goal.exit_logits[place] for place in self._partners(inner)]
            total = total + prediction * prediction_loss(out.exit_logits, goals, labels, hard)
        return total
