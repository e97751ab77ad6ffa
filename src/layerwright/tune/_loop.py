"""The training loop that all tuners share, and copies that can be trained without touching the original."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from layerwright.core.calibration import Calibration, LossFunction, as_calibration, evaluating
from layerwright.core.errors import InputError, require_extra
from layerwright.core.layers import structure_copy
from layerwright.core.processes import process_count

__all__ = ["Progress", "Schedule", "opening", "restore_flags_", "train_", "trainable_copy"]

M = TypeVar("M", bound=nn.Module)
Part = tuple[dict[str, Any], Sequence[nn.Parameter]]
"""A label for groups of an optimizer, such as ``{"block": 3}``, and what is in them."""
Progress = Callable[[str, int, int], None]
"""``progress(what, done, total)``."""


@dataclass(frozen=True)
class Schedule:
    """How a tuner steps: AdamW, linear warm-up, cosine decay to a tenth.

    Attributes:
        steps: optimizer steps, at least 1.
        learning_rate: the highest one.
        weight_decay: decoupled, on matrices only.
        warmup: share of the steps during which the rate rises.
        batches_per_step: batches whose mean gradient makes one step.
        clip: bound on the norm of the gradient.
        seed: of the order of the batches.

    Raises:
        InputError: a number outside its range.
    """

    steps: int = 100
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    warmup: float = 0.05
    batches_per_step: int = 1
    clip: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in (("steps", 1), ("batches_per_step", 1)):
            if getattr(self, name) < low:
                raise InputError(f"{name}: got {getattr(self, name)}, expected at least {low}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise InputError(f"learning_rate: got {self.learning_rate}, expected a positive number")
        if self.weight_decay < 0 or not 0 <= self.warmup < 1 or self.clip <= 0:
            raise InputError("weight_decay must be >= 0, warmup in [0, 1), clip > 0")

    def factor(self, step: int) -> float:
        """Share of the highest learning rate at `step` (0-based)."""
        rising = round(self.warmup * self.steps)
        if step < rising:
            return (step + 1) / (rising + 1)
        done = (step - rising) / max(1, self.steps - rising)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * done))


def opening(
    calibration: Calibration | Any,
    loss_fn: LossFunction | None,
    steps: int,
    learning_rate: float,
    weight_decay: float,
    warmup: float,
    batches_per_step: int,
    clip: float,
    seed: int,
) -> tuple[Calibration, Schedule]:
    """What every tuner begins with: its data and its schedule, checked before anything is copied.

    Raises:
        InputError: a setting outside its range (see `Schedule`), or no batches.
    """
    data = as_calibration(calibration, loss_fn)
    return data, Schedule(steps, learning_rate, weight_decay, warmup, batches_per_step, clip, seed)


def trainable_copy(model: M, choose: Callable[[str, Tensor], bool]) -> M:
    """A copy of `model` whose parameters that `choose(name, tensor)` names are its own and can be trained.

    All other parameters are frozen and share their memory with `model`, which keeps its values and flags. Memory: one
    copy of the chosen parameters.
    """
    copy = structure_copy(model)
    new: dict[int, nn.Parameter] = {}
    for path, module in copy.named_modules():
        for name, old in list(module._parameters.items()):
            if old is None:
                continue
            if id(old) not in new:
                wanted = old.is_floating_point() and choose(f"{path}.{name}" if path else name, old)
                values = old.detach().clone() if wanted else old.detach()
                new[id(old)] = nn.Parameter(values, requires_grad=wanted)
            module._parameters[name] = new[id(old)]
    return copy


def restore_flags_(copy: nn.Module, model: nn.Module) -> None:
    """Let the parameters of `copy` require gradients where those of the same name in `model` do."""
    flags = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
    for name, parameter in copy.named_parameters():
        parameter.requires_grad_(flags.get(name, True))


def train_(
    model: nn.Module,
    items: Sequence[Any],
    loss_of: Callable[[nn.Module, Any], Tensor],
    schedule: Schedule,
    *,
    parameters: Sequence[nn.Parameter] | None = None,
    progress: Progress | None = None,
    name: str = "tuning",
    distributed: bool = True,
    parts: Sequence[Part] = (),
    before_step: Callable[[Any, int], None] | None = None,
    training: bool = False,
    optimizer_of: Callable[[list[dict[str, Any]]], torch.optim.Optimizer] | None = None,
) -> list[float]:
    """Train `parameters` of `model` (default: all that require gradients) to lower ``loss_of(model, item)``.

    The model runs in evaluation mode: dropout is off, statistics of batch norms stay; with `training` it runs in
    training mode, for networks that are trained from nothing. Parameters of half precision are
    stepped in float32 and rounded afterwards, so that small steps are not lost. Started by ``accelerate launch`` or
    ``torchrun``, each process takes its share of the items: `n` processes make the steps that one makes with `n` times
    the `batches_per_step`, and all end with the same weights. With `distributed` False every process trains on all.

    The parameters of `parts` make groups of their own in the optimizer, which carry the part's label;
    ``before_step(optimizer, step)`` is called once the rates of a step are set, and may change them. Another optimizer
    than AdamW is built by ``optimizer_of(groups)``.

    Returns:
        The loss of each step.

    Raises:
        InputError: nothing to train, no items, or a loss that is not finite.
    """
    trained = [p for p in model.parameters() if p.requires_grad] if parameters is None else list(parameters)
    if not trained:
        raise InputError("nothing to train: no parameter of this kind in the model")
    if not items:
        raise InputError("no batches to train on")
    masters = [p if p.dtype in (torch.float32, torch.float64) else _master(p) for p in trained]
    groups = _groups(trained, masters, parts, schedule.weight_decay)
    adamw = functools.partial(torch.optim.AdamW, lr=schedule.learning_rate, betas=(0.9, 0.95))
    optimizer: Any = (optimizer_of or adamw)(groups)
    accelerator = _accelerator(trained[0].device) if distributed else None
    running = model
    if accelerator is not None:
        running, optimizer = accelerator.prepare(model, optimizer)
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    order = _order(len(items), schedule.steps * schedule.batches_per_step * world, schedule.seed)
    losses: list[float] = []
    with evaluating(running), torch.enable_grad():
        running.train(training)
        for step in range(schedule.steps):
            for group in optimizer.param_groups:
                group["lr"] = schedule.learning_rate * schedule.factor(step)
            if before_step:
                before_step(optimizer, step)
            total = 0.0
            for number in range(schedule.batches_per_step):
                place = (step * schedule.batches_per_step + number) * world + rank
                loss = loss_of(running, items[order[place]]) / schedule.batches_per_step
                if not torch.isfinite(loss):
                    raise InputError(f"{name}: the loss is not finite at step {step}: lower the learning rate")
                accelerator.backward(loss) if accelerator else torch.autograd.backward(loss)
                total += float(loss.detach())
            _step_(optimizer, trained, masters, schedule.clip)
            losses.append(total)
            if progress:
                progress(name, step + 1, schedule.steps)
    return losses


def _groups(
    trained: Sequence[nn.Parameter],
    masters: Sequence[nn.Parameter],
    parts: Sequence[Part],
    weight_decay: float,
) -> list[dict[str, Any]]:
    """Groups of an optimizer: matrices and vectors of what is in no part, then of each part."""
    place = {id(parameter): number for number, (_, inside) in enumerate(parts) for parameter in inside}
    groups: list[dict[str, Any]] = []
    for number in (None, *range(len(parts))):
        own = [m for p, m in zip(trained, masters, strict=True) if place.get(id(p)) == number]
        label = {} if number is None else parts[number][0]
        for decay, inside in ((weight_decay, [m for m in own if m.dim() >= 2]), (0.0, [m for m in own if m.dim() < 2])):
            if inside or number is None:
                groups.append({"params": inside, "weight_decay": decay, **label})
    return groups


def _master(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().float().clone())


def _step_(optimizer: Any, trained: Sequence[nn.Parameter], masters: Sequence[nn.Parameter], clip: float) -> None:
    for parameter, master in zip(trained, masters, strict=True):
        if master is not parameter and parameter.grad is not None:
            master.grad = parameter.grad.float()
            parameter.grad = None
    nn.utils.clip_grad_norm_(masters, clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        for parameter, master in zip(trained, masters, strict=True):
            if master is not parameter:
                parameter.copy_(master)


def _order(count: int, draws: int, seed: int) -> list[int]:
    """`draws` places in ``range(count)``: one shuffle after the other."""
    generator = torch.Generator().manual_seed(seed)
    rounds = -(-draws // count)
    return [i for _ in range(rounds) for i in torch.randperm(count, generator=generator).tolist()][:draws]


def _accelerator(device: torch.device) -> Any:
    """An ``accelerate.Accelerator`` if this process was started as one of several or by ``accelerate launch``."""
    if process_count() < 2 and "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return None
    return require_extra("accelerate", "tune").Accelerator(cpu=device.type == "cpu")
