"""What a task of comparing shapes consists of, and what several of them share."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from layerwright.allocate.equal_parameters import Shape
from layerwright.core.calibration import to_device

__all__ = ["SEED_APART", "ShapeTask", "class_loss", "digest", "judge_classes", "to_device"]

SEED_APART = 1_000_003
"""Seeds of what is held out lie this far from those of training."""


@dataclass(frozen=True)
class ShapeTask:
    """One task.

    Attributes:
        name: of the task.
        quality: what is compared, with its unit; `higher_is_better` says which way.
        tokens: of a sample.
        gated, causal: form of the blocks.
        build: ``build(shape, seed)``, an untrained network.
        items: ``items(steps, batch, seed)``, the training batches, the same for all shapes.
        loss: ``loss(model, item)``, mean nats or squared error.
        judge: ``judge(model)``: `quality` and `loss` on held-out data.
        example: ``example(batch)``: input of a forward pass.
        trunk: the part whose forward pass is timed, and whose blocks are looked at.
        drop_cls: whether its first token is no token of the data.
        data: hash of the held-out data.
    """

    name: str
    quality: str
    higher_is_better: bool
    tokens: int
    gated: bool
    causal: bool
    build: Callable[[Shape, int], nn.Module]
    items: Callable[[int, int, int], list[Any]]
    loss: Callable[[nn.Module, Any], Tensor]
    judge: Callable[[nn.Module], dict[str, float]]
    example: Callable[[int], Tensor]
    trunk: Callable[[nn.Module], nn.Module]
    drop_cls: bool
    data: str


def class_loss(model: nn.Module, item: Any) -> Tensor:
    """Mean nats of the classes of ``(inputs, labels)``."""
    return nn.functional.cross_entropy(model(item[0]).float(), item[1])


@torch.no_grad()
def judge_classes(model: nn.Module, test: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Accuracy and mean nats on ``(inputs, labels)``."""
    device = next(model.parameters()).device
    logits = torch.cat([model(part.to(device)).float().cpu() for part in test[0].split(50)])
    right = (logits.argmax(1) == test[1]).float().mean()
    return {"quality": float(right), "loss": float(nn.functional.cross_entropy(logits, test[1]))}


def digest(*tensors: Tensor) -> str:
    """The first 12 digits of a hash of all values."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()[:12]
