"""Train a few blocks at a time, each window below an exit of its own (Yu et al., 2024, EDGE-LLM, arXiv 2406.15758)."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerwright.core.calibration import Calibration, LossFunction, evaluating
from layerwright.core.errors import InputError
from layerwright.nn.exits import ExitModel
from layerwright.nn.lora import LoraLinear
from layerwright.nn.treated import TreatedLinear
from layerwright.treat.exits import add_exits, exit_positions
from layerwright.tune._loop import Progress, Schedule, opening, restore_flags_, trainable_copy
from layerwright.tune._window_steps import WindowOptimizers, batch_order, zero_masks
from layerwright.tune.lora import Adapted, _attach_own, lora_targets
from layerwright.tune.saved_bytes import SavedBytes

__all__ = ["WindowReport", "WindowSchedule", "WindowTuner", "exit_order", "window"]

WindowSchedule = Literal["phases", "cyclic", "random"]
Heads = Literal["all", "early", "none"]
LORA: Mapping[str, Any] = {"rank": 8, "alpha": 16.0}


@dataclass(frozen=True)
class WindowReport:
    """What a run of `WindowTuner` left.

    Attributes:
        model: the trained copy, with exits, and adapters where there are any.
        exits: the exit of each step.
        losses: next-token cross entropy of each step at its exit, in nats.
        saved_bytes: what each step kept for its backward pass (the largest of its batches).
        state_bytes: of optimizer states at the end of each step, on the device of the model.
        seconds: of each step.
    """

    model: ExitModel
    exits: tuple[int, ...]
    losses: tuple[float, ...]
    saved_bytes: tuple[int, ...]
    state_bytes: tuple[int, ...]
    seconds: tuple[float, ...]

    @property
    def peak_saved_bytes(self) -> int:
        """The largest of `saved_bytes`."""
        return max(self.saved_bytes)

    def losses_of(self, exit: int) -> tuple[float, ...]:
        """The losses of the steps at that exit."""
        return tuple(loss for loss, place in zip(self.losses, self.exits, strict=True) if place == exit)


class WindowTuner:
    """Each step picks an exit, runs the blocks up to it and trains the last few of them with that exit's head.

    Blocks below the window run without gradients and blocks above the exit do not run, so that activations are kept for
    `window` blocks only. Optimizer states are made when a window is first trained; a finished window's are dropped
    (``phases``) or moved off the model's device. Weights that are zero when training starts stay zero.

    Args:
        exit_model: left as it is; a copy is trained.
        stride: train the exits every so many blocks (and the last); None takes all exits of the model.
        window: blocks that are trained below an exit; None takes those since the exit before.
        schedule: ``phases`` trains exit after exit from the lowest, as many steps each, the rest of the steps for the
            last; ``cyclic`` changes the exit with every step; ``random`` draws it.
        lora: rank and alpha of adapters on all linear layers of the blocks, whose own weights are frozen; None trains
            the weights of the window themselves.
        learning_rate, weight_decay, warmup, clip, batches_per_step: of AdamW with ``betas=(0.9, 0.999)``; see
            `Schedule`. In phases, each phase warms up and decays by itself.
        heads: whose heads are trained: of ``all`` exits, of the ``early`` ones, or of ``none``.
        seed: of adapters, order of batches and random exits.

    Warns:
        UserWarning: gradient checkpointing is on, or `stride` does not divide the number of blocks.

    Raises:
        InputError: exits that the model does not have, a window above the lowest exit, or a setting outside its range.
    """

    def __init__(
        self,
        exit_model: ExitModel,
        stride: int | None = None,
        window: int | None = None,
        *,
        schedule: WindowSchedule = "phases",
        lora: Mapping[str, Any] | None = LORA,
        learning_rate: float = 4e-4,
        weight_decay: float = 0.0,
        warmup: float = 0.03,
        clip: float = 0.3,
        batches_per_step: int = 1,
        heads: Heads = "all",
        seed: int = 0,
    ) -> None:
        if not isinstance(exit_model, ExitModel):
            raise InputError(f"exit_model: got {type(exit_model).__name__}, expected what add_exits returns")
        for name, value, known in (("schedule", schedule, WindowSchedule), ("heads", heads, Heads)):
            if value not in get_args(known):
                raise InputError(f"{name}: got {value!r}, expected {', '.join(get_args(known))}")
        places = exit_model.positions if stride is None else exit_positions(exit_model.depth, stride)
        self.exits = tuple(exit_model.check(place) for place in places)
        if window is not None and not 1 <= window <= self.exits[0]:
            raise InputError(f"window: got {window}, expected 1 to the {self.exits[0]} blocks of the lowest exit")
        unknown = [key for key in lora or {} if key not in ("rank", "alpha")]
        if unknown:
            raise InputError(f"lora: unknown {', '.join(unknown)}; known: rank, alpha")
        if any(getattr(module, "gradient_checkpointing", False) for module in exit_model.modules()):
            warnings.warn(
                "gradient checkpointing is on; a window's blocks are few, and those below it keep nothing: turn it off",
                UserWarning,
                stacklevel=2,
            )
        self.model, self.schedule, self.heads, self.seed = exit_model, schedule, heads, seed
        self.lora = None if lora is None else {**LORA, **lora}
        self.batches_per_step = batches_per_step
        self._settings = (learning_rate, weight_decay, warmup, batches_per_step, clip, seed)
        Schedule(1, *self._settings)  # refuses what is out of range
        below = (0, *self.exits[:-1])
        self.windows = {
            place: place - low if window is None else window for place, low in zip(self.exits, below, strict=True)
        }

    def fit(
        self,
        batches: Calibration | Sequence[Any],
        steps: int,
        *,
        loss_fn: LossFunction | None = None,
        progress: Progress | None = None,
    ) -> WindowReport:
        """Train a copy for `steps` optimizer steps on `batches` and report.

        Args:
            batches: mappings with ``input_ids`` ``(batch, tokens)`` and, if some tokens do not count, ``labels`` (-100
                there) and ``attention_mask``.
            steps: at least 1.
            loss_fn: ``loss_fn(logits, batch) -> scalar`` instead of the next-token cross entropy.
            progress: ``progress(name, done, total)``.

        Raises:
            InputError: no batches, batches of another form, fewer steps than 1, or a loss that is not finite.
        """
        order = exit_order(self.exits, steps, self.schedule, self.seed)
        items = list(batches)
        if not items or not all(isinstance(item, Mapping) and "input_ids" in item for item in items):
            raise InputError("batches: expected at least one mapping with input_ids (batch, tokens)")
        model = self.trainable()
        masks = {} if self.lora is not None else zero_masks(model.blocks)
        optimizers = WindowOptimizers(
            {place: self.parameters(model, place) for place in self.exits}, masks, drop=self.schedule == "phases"
        )
        phases = self.schedule == "phases"
        lengths = {place: order.count(place) if phases else steps for place in self.exits}
        schedules = {place: Schedule(max(1, length), *self._settings) for place, length in lengths.items()}
        draws = batch_order(len(items), steps * self.batches_per_step, self.seed)
        done = dict.fromkeys(self.exits, 0)
        losses, saved, states, seconds = [], [], [], []
        with evaluating(model), torch.enable_grad():
            for step, place in enumerate(order):
                begun = time.perf_counter()
                schedule = schedules[place]
                rate = schedule.learning_rate * schedule.factor(done[place] if phases else step)
                optimizers.take_(place, rate, schedule.weight_decay)
                total, most = 0.0, 0
                for number in range(self.batches_per_step):
                    batch = items[draws[step * self.batches_per_step + number]]
                    with SavedBytes(model) as kept:
                        loss = self._loss(model, place, batch, loss_fn) / self.batches_per_step
                    if not torch.isfinite(loss):
                        raise InputError(f"window: the loss is not finite at step {step}: lower the learning rate")
                    torch.autograd.backward(loss)
                    total, most = total + float(loss.detach()), max(most, kept.bytes)
                optimizers.step_(place, schedule.clip)
                done[place] += 1
                losses.append(total)
                saved.append(most)
                states.append(optimizers.state_bytes(place))
                seconds.append(time.perf_counter() - begun)
                if progress:
                    progress("window tuning", step + 1, steps)
        optimizers.close_()
        return WindowReport(model, order, tuple(losses), tuple(saved), tuple(states), tuple(seconds))

    def trainable(self) -> ExitModel:
        """A copy of the model whose windows and heads can be trained; with adapters where there are any."""
        blocks = tuple(f"model.{path}." for path in self.model.block_paths)
        full = self.lora is None
        copy = trainable_copy(
            self.model, lambda name, _: name.startswith("heads.") or (full and name.startswith(blocks))
        )
        if self.lora is not None:
            paths = lora_targets(copy.model)
            rank = self.lora["rank"]
            _attach_own(copy.model, dict.fromkeys(paths, rank), self.lora["alpha"] / rank, self.seed)
        for parameter in copy.parameters():
            parameter.requires_grad_(False)
        return copy

    def parameters(self, model: ExitModel, exit: int) -> list[nn.Parameter]:
        """What a step at that exit trains, of a copy made by `trainable`."""
        window = model.blocks[exit - self.windows[exit] : exit]
        if self.lora is None:
            found = [p for block in window for p in block.parameters() if p.is_floating_point()]
        else:
            adapters = [m for block in window for m in block.modules() if isinstance(m, LoraLinear)]
            found = [p for adapter in adapters for p in (adapter.lora_A, adapter.lora_B)]
        if self.heads == "all" or (self.heads == "early" and exit != model.depth):
            found += list(model.head(exit).parameters())
        if not found:
            raise InputError(f"exit {exit}: its window has nothing to train")
        return list({id(p): p for p in found}.values())

    def _loss(self, model: ExitModel, exit: int, batch: Mapping[str, Any], loss_fn: LossFunction | None) -> Tensor:
        ids = batch["input_ids"]
        extra = {"attention_mask": batch["attention_mask"]} if "attention_mask" in batch else {}
        logits = model(ids, exit, window=self.windows[exit], **extra)
        if loss_fn is not None:
            return loss_fn(logits, batch)
        labels = batch.get("labels", ids)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


def exit_order(exits: Sequence[int], steps: int, schedule: WindowSchedule, seed: int = 0) -> tuple[int, ...]:
    """The exit of each step; see `WindowTuner`.

    Raises:
        InputError: fewer steps than 1, in phases than exits.
    """
    least = len(exits) if schedule == "phases" else 1
    if steps < least:
        raise InputError(f"steps: got {steps}, expected at least {least} for {len(exits)} exits by {schedule}")
    if schedule == "phases":
        each = steps // len(exits)
        return tuple(exits[min(step // each, len(exits) - 1)] for step in range(steps))
    if schedule == "cyclic":
        return tuple(exits[step % len(exits)] for step in range(steps))
    generator = torch.Generator().manual_seed(seed)
    return tuple(exits[i] for i in torch.randint(len(exits), (steps,), generator=generator).tolist())


def window(
    model: nn.Module,
    calibration: Calibration | Any,
    *,
    teacher: nn.Module | None = None,
    loss_fn: LossFunction | None = None,
    seed: int = 0,
    steps: int = 100,
    every: int = 0,
    schedule: WindowSchedule = "phases",
    rank: int = 8,
    alpha: float = 16.0,
    learning_rate: float = 4e-4,
    weight_decay: float = 0.0,
    warmup: float = 0.03,
    batches_per_step: int = 1,
    clip: float = 0.3,
    merge: bool = True,
    dequantize: bool = False,
    progress: Progress | None = None,
) -> nn.Module:
    """A copy of a language model recovered by adapters, trained window by window with little memory; without exits.

    The heads of early exits serve the training and are left behind; the model's own head stays as it is. For a model
    that keeps its exits and votes, use `WindowTuner`.

    Args:
        model: left untouched.
        calibration: batches with ``input_ids``.
        teacher, loss_fn: not used; every tuner takes them.
        every: blocks between exits, also the window; 0 takes a quarter of the blocks.
        rank, alpha: of the adapters.
        merge: take the adapters up into the weights; over packed weights they stay beside them.
        dequantize: with `merge`, make packed weights dense so that they can be merged.
        schedule, seed, steps, learning_rate, weight_decay, warmup, batches_per_step, clip: see `WindowTuner`.
        progress: ``progress(name, done, total)``.

    Raises:
        InputError: no causal language model, a setting outside its range, a loss that is not finite.
    """
    del teacher
    data, _ = opening(calibration, loss_fn, steps, learning_rate, weight_decay, warmup, batches_per_step, clip, seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a shorter last window is what is wanted here
        probe = add_exits(model, every=1)
        exits = add_exits(model, every=every or -(-probe.depth // 4))
    tuner = WindowTuner(
        exits,
        schedule=schedule,
        lora={"rank": rank, "alpha": alpha},
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        warmup=warmup,
        clip=clip,
        batches_per_step=batches_per_step,
        heads="early",
        seed=seed,
    )
    tuned = tuner.fit(data, steps, progress=progress).model.model
    packed = any(isinstance(module, TreatedLinear) for module in tuned.modules())
    result = Adapted(tuned, tuned, False).handed_back(
        model, merge=merge and (dequantize or not packed), dequantize=dequantize
    )
    restore_flags_(result, model)
    return result
