"""Train parts of a model one stage after the other: first what is new, then all of it with adapters (TroL)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import nn

from layerwright.core.calibration import Calibration, LossFunction, as_calibration
from layerwright.core.errors import InputError
from layerwright.tune._loop import Progress, Schedule, restore_flags_, train_, trainable_copy
from layerwright.tune.lora import attach_lora

__all__ = ["TROL_STAGES", "Stage", "two_step"]

M = TypeVar("M", bound=nn.Module)
LORA = "lora"
_PARTS = {"mixers": "traversal.mixer", "routers": "token_routing.router"}


@dataclass(frozen=True)
class Stage:
    """What is trained, and how.

    Attributes:
        train: names of modules (``projector``: all parameters with that name in their path), ``mixers`` (gates of
            traversed blocks), ``routers``, or ``lora`` (adapters that are merged at the end of the stage).
        schedule: steps and rates.
        rank: of the adapters.
        targets: layers that get adapters, as in `lora`; None for all linear layers of the blocks.

    Raises:
        InputError: nothing to train.
    """

    train: tuple[str, ...]
    schedule: Schedule = field(default_factory=Schedule)
    rank: int = 8
    targets: str | tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.train, str) or not self.train:
            raise InputError(f"train: got {self.train!r}, expected names of what this stage trains")

    def chooses(self, name: str) -> bool:
        """Whether the parameter of that full name is trained."""
        around = f".{name}"
        return any(f".{_PARTS.get(part, part)}." in around for part in self.train if part != LORA)


TROL_STAGES = (Stage(("projector", "mixers")), Stage(("projector", "mixers", LORA)))
"""First the projector and the gates, with all else frozen; then the language model too, through adapters."""


def two_step(
    model: M,
    calibration: Calibration | Any,
    stages: Sequence[Stage] = TROL_STAGES,
    *,
    loss_fn: LossFunction | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> M:
    """A copy of `model`, trained stage by stage (Lee et al., 2024, TroL, arXiv 2406.12246).

    Args:
        model: left untouched; everything that no stage names stays as it is and shares its memory.
        calibration: batches with labels, or with a loss function; the same for all stages.
        stages: in order.
        seed: of the adapters.

    Raises:
        InputError: no stage, or a name that no parameter has.
    """
    if not stages:
        raise InputError("stages: got none, expected one stage or more")
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    for stage in stages:
        for part in stage.train:
            if part != LORA and not any(Stage((part,)).chooses(name) for name in names):
                raise InputError(f"train: {type(model).__name__} has no parameter in a module called {part!r}")
    data = as_calibration(calibration, loss_fn)
    current: nn.Module = trainable_copy(model, lambda name, _tensor: any(stage.chooses(name) for stage in stages))
    for number, stage in enumerate(stages):
        adapters = LORA in stage.train
        adapted = attach_lora(current, rank=stage.rank, seed=seed, targets=stage.targets) if adapters else None
        running = current if adapted is None else adapted.model
        for name, parameter in running.named_parameters():
            parameter.requires_grad_(stage.chooses(name) or (adapters and "lora_" in name))
        train_(running, list(data), data.loss, stage.schedule, progress=progress, name=f"stage {number + 1}")
        if adapted is not None:
            current = adapted.merged()
    restore_flags_(current, model)
    return current  # type: ignore[return-value]
