"""Fewer blocks first, adapters on the rest after (Zhu et al., 2023), and what that saves."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from layerwright.core.calibration import Calibration, as_calibration
from layerwright.core.errors import InputError
from layerwright.treat.arrange import BlockMap
from layerwright.treat.drop import keep_blocks
from layerwright.tune._loop import Progress, opening, train_
from layerwright.tune.lora import Adapted, attach_lora
from layerwright.tune.saved_bytes import SavedBytes

__all__ = ["StepCost", "TuningReport", "prune_then_lora", "step_cost"]


@dataclass(frozen=True)
class StepCost:
    """What one training step takes.

    Attributes:
        seconds: median time of forward, backward and update.
        saved_bytes: activations kept for the backward pass.
        trainable: parameters that are trained.
        total: parameters.
    """

    seconds: float
    saved_bytes: int
    trainable: int
    total: int

    @property
    def share(self) -> float:
        """Trained share of the parameters."""
        return self.trainable / self.total

    @property
    def state_bytes(self) -> int:
        """Gradients and the two moments of AdamW, in float32."""
        return 12 * self.trainable


@dataclass(frozen=True)
class TuningReport:
    """What `prune_then_lora` did.

    Attributes:
        before: a step of the same adapters on the whole model.
        after: a step on the shorter one.
        block_map: where the remaining blocks went.
        adapted: the trained model before its adapters are merged.
    """

    before: StepCost
    after: StepCost
    block_map: BlockMap
    adapted: Adapted


def prune_then_lora(
    model: nn.Module,
    keep: Sequence[int] | Mapping[str, Sequence[int]],
    calibration: Calibration | Any,
    *,
    rank: int = 16,
    alpha: float = 32.0,
    dropout: float = 0.1,
    targets: str | Sequence[str] | None = "ff",
    bias: str = "none",
    steps: int = 100,
    learning_rate: float = 1e-4,
    weight_decay: float = 0.01,
    warmup: float = 0.05,
    clip: float = 1.0,
    seed: int = 0,
    move_tables: bool = True,
    progress: Progress | None = None,
) -> tuple[nn.Module, TuningReport]:
    """Keep the listed blocks, train adapters on their feed-forward layers, and merge them (Zhu et al., 2023).

    The order matters: adapters that were trained on all blocks do not repair a shorter model. Source: arXiv 2305.08285,
    whose settings are the defaults (rank 16, alpha 32, dropout 0.1, AdamW with weight decay 0.01).

    Args:
        model: left untouched; a decoder, an encoder, or both (T5, BART).
        keep: as `layerwright.treat.drop.keep_blocks`; `layerwright.allocate.interleaved.interleaved_keep` makes the
            published lists.
        calibration: batches with labels.
        rank, alpha, dropout, targets, bias: of the adapters; see `layerwright.tune.lora.lora`.
        steps, learning_rate, weight_decay, warmup, clip, seed: see `layerwright.tune.full.full`.
        move_tables: give a position table of a dropped first block to the block that is first then.
        progress: ``progress(name, done, total)``.

    Returns:
        The shorter, tuned model, and the cost of a step before and after.

    Raises:
        InputError: as `keep_blocks` and `lora`; a model that carries adapters already.
    """
    data, schedule = opening(calibration, None, steps, learning_rate, weight_decay, warmup, 1, clip, seed)
    settings: dict[str, Any] = {"rank": rank, "alpha": alpha, "dropout": dropout, "targets": targets, "bias": bias}
    shorter, block_map = keep_blocks(model, keep, move_tables=move_tables)
    before = step_cost(attach_lora(model, seed=seed, **settings).model, data)
    adapted = attach_lora(shorter, seed=seed, **settings)
    after = step_cost(attach_lora(shorter, seed=seed, **settings).model, data)
    train_(adapted.model, list(data), data.loss, schedule, progress=progress, name="LoRA")
    report = TuningReport(before, after, block_map, adapted)
    return adapted.handed_back(model, merge=True, dequantize=False), report


def step_cost(model: nn.Module, calibration: Calibration | Any, repeats: int = 5) -> StepCost:
    """Time and memory of a training step of what is trainable in `model`, on the first batches.

    The trainable parameters change as if trained with a learning rate of zero: not at all.

    Raises:
        InputError: nothing is trainable, or there is no data.
    """
    data = as_calibration(calibration)
    trained = [p for p in model.parameters() if p.requires_grad]
    batches = list(islice(data, repeats)) or []
    if not trained or not batches:
        raise InputError(
            "step_cost: the model has no trainable parameter, or there is no batch; freeze less, give data"
        )
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0)
    modes = {module: module.training for module in model.modules()}
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()  # its statistics are not the measurement's to change
    saved, seconds = 0, []
    for number in range(repeats + 1):  # the first one makes the optimizer's state, and counts the bytes
        batch = batches[number % len(batches)]
        begun = time.perf_counter()
        if number == 0:
            with SavedBytes(model) as counter:
                loss = data.loss(model, batch)
            saved = counter.bytes
        else:
            loss = data.loss(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - begun)
    for module, mode in modes.items():
        module.training = mode
    count = sum(p.numel() for p in trained)
    return StepCost(statistics.median(seconds[1:]), saved, count, sum(p.numel() for p in model.parameters()))
