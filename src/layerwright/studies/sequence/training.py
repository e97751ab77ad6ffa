"""Training on windows of bytes: every arm of a study sees the same ones in the same order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from layerwright.core.errors import InputError
from layerwright.studies.sequence.corpus import Split, byte_stream
from layerwright.tune._loop import Part, Progress, Schedule, train_

__all__ = ["next_byte_loss", "train_bytes", "train_windows"]

M = TypeVar("M", bound=nn.Module)


def train_windows(
    count: int, length: int, *, split: Split = "train", seed: int = 0, batch: int = 32
) -> list[dict[str, Tensor]]:
    """`count` batches of windows ``(batch, length)`` drawn at random, as ``input_ids`` and ``labels``.

    Raises:
        InputError: windows longer than the text.
    """
    stream = byte_stream(split)
    if not 1 <= length < len(stream):
        raise InputError(f"length: got {length}, expected 1 to {len(stream) - 1} bytes of the {split} part")
    draw = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(stream) - length, (count, batch, 1), generator=draw)
    windows = stream[starts + torch.arange(length)].long()
    return [{"input_ids": ids, "labels": ids} for ids in windows]


def next_byte_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The model's own loss; of its logits ``(batch, tokens, vocabulary)`` where it has none. Nats per byte."""
    output: Any = model(**batch) if hasattr(model, "config") else model(batch["input_ids"])
    if getattr(output, "loss", None) is not None:
        loss: Tensor = output.loss
        return loss
    logits = output.logits if hasattr(output, "logits") else output
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch["labels"][:, 1:].flatten())


def train_bytes(
    model: M,
    *,
    steps: int,
    batch: int = 32,
    context: int = 128,
    learning_rate: float = 2e-3,
    weight_decay: float = 0.1,
    seed: int = 0,
    loss: Callable[[nn.Module, Any], Tensor] = next_byte_loss,
    parts: Sequence[Part] = (),
    before_step: Callable[[Any, int], None] | None = None,
    progress: Progress | None = None,
    name: str = "training",
) -> M:
    """Train `model` in place on `steps` batches of windows, in training mode, and return it in evaluation mode.

    AdamW (0.9, 0.95), decay on matrices only, a tenth of the steps warm-up, cosine to a tenth, clip 1. Models of the
    same `seed`, `steps`, `batch` and `context` see the same windows in the same order.
    """
    schedule = Schedule(steps, learning_rate, weight_decay, warmup=0.1, seed=seed)
    windows = train_windows(steps, context, seed=seed, batch=batch)
    train_(
        model,
        windows,
        loss,
        schedule,
        parts=parts,
        before_step=before_step,
        progress=progress,
        name=name,
        distributed=False,
        training=True,
    )
    return model.eval()
