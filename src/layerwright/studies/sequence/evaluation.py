"""How well a model predicts the next byte."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from layerwright.core.errors import InputError
from layerwright.studies.sequence.corpus import Split, byte_stream

__all__ = ["bits_per_byte", "fixed_windows", "loss_by_position"]


def fixed_windows(split: Split, count: int, length: int) -> Tensor:
    """`count` windows ``(count, length)`` spread evenly over a part, without overlap where the part is long enough."""
    stream = byte_stream(split)
    if not 1 <= length < len(stream):
        raise InputError(f"length: got {length}, expected 1 to {len(stream) - 1} bytes of the {split} part")
    starts = torch.linspace(0, len(stream) - length, count).long()
    return stream[starts[:, None] + torch.arange(length)].long()


@torch.no_grad()
def _losses(model: nn.Module, windows: Tensor, batch: int) -> Tensor:
    """Nats of each byte but the first, ``(windows, length - 1)``."""
    was = model.training
    model.eval()
    found = []
    for ids in windows.split(batch):
        output: Any = model(input_ids=ids) if hasattr(model, "config") else model(ids)
        logits = output.logits if hasattr(output, "logits") else output
        found.append(nn.functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none"))
    model.train(was)
    return torch.cat(found)


def loss_by_position(
    model: nn.Module, split: Split = "heldout", windows: int = 256, context: int = 128, batch: int = 32
) -> Tensor:
    """Mean nats of the byte at each place but the first, ``(context - 1,)``, over fixed windows, in evaluation mode."""
    return _losses(model, fixed_windows(split, windows, context), batch).mean(0)


def bits_per_byte(
    model: nn.Module,
    split: Split = "heldout",
    windows: int = 256,
    context: int = 128,
    *,
    sliding: bool = False,
    batch: int = 32,
) -> float:
    """Mean bits of the next byte over fixed windows, in evaluation mode.

    Args:
        model: a causal model; called with ``input_ids`` where it has a configuration, with the ids otherwise.
        split: part of the corpus; never the one it was trained on.
        windows, context: how many, and bytes in each.
        sliding: count the second half of each window only, so that all bytes counted have half a window before them.
        batch: windows at once.
    """
    places = loss_by_position(model, split, windows, context, batch)
    return float(places[context // 2 - 1 :].mean() if sliding else places.mean()) / math.log(2)
