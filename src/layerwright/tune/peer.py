"""Put a layer of very many small experts into a model and train on (He, 2024, PEER)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from layerwright.core.calibration import Calibration, LossFunction
from layerwright.core.errors import InputError
from layerwright.nn.peer import PEER
from layerwright.treat.swap_peer import find_peers, swap_peer
from layerwright.tune._loop import Part, Progress, opening, restore_flags_, train_, trainable_copy

__all__ = ["expert_parts", "peer", "set_expert_rates"]


def peer(
    model: nn.Module,
    calibration: Calibration | Any,
    *,
    teacher: nn.Module | None = None,
    loss_fn: LossFunction | None = None,
    seed: int = 0,
    blocks: Sequence[str] | Sequence[int] | str | None = None,
    num_experts: int = 128**2,
    heads: int = 8,
    top_k: int = 16,
    query_dim: int = 64,
    expert_rate: float = 4.0,
    steps: int = 100,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.1,
    warmup: float = 0.05,
    batches_per_step: int = 1,
    clip: float = 1.0,
    progress: Progress | None = None,
) -> nn.Module:
    """A copy of `model` with `PEER` layers in place of feed-forward parts, all of it trained on the labels.

    A model that has such layers is trained on as it is. Query norms take the statistics of each batch and remember
    them; the rest runs in evaluation mode. Gradients of the experts are dense here, since clipping and AdamW want them
    so. Memory: four times the parameters in float32, the new experts' included. Source: He, 2024, arXiv 2407.04153.

    Args:
        model: left untouched.
        calibration: batches with labels, or with a loss function.
        teacher: not used; every tuner takes one.
        loss_fn: ``loss_fn(model, batch) -> scalar``, where batches have no labels.
        blocks, num_experts, heads, top_k, query_dim: see `swap_peer`.
        expert_rate: experts and keys learn at so many times the rate, and without decay.
        seed, steps, learning_rate, weight_decay, warmup, batches_per_step, clip: see `Schedule`.
        progress: ``progress(name, done, total)``.

    Raises:
        InputError, TypeError: a setting outside its range, or a model without such parts.
    """
    del teacher
    data, schedule = opening(
        calibration, loss_fn, steps, learning_rate, weight_decay, warmup, batches_per_step, clip, seed
    )
    if not 0 < expert_rate < float("inf"):
        raise InputError(f"expert_rate: got {expert_rate}, expected a number above 0")
    swapped = model
    if not find_peers(model):
        shape: dict[str, Any] = {"num_experts": num_experts, "heads": heads, "top_k": top_k, "query_dim": query_dim}
        swapped, _ = swap_peer(model, blocks, seed=seed, **shape)
    copy = trainable_copy(swapped, lambda _name, _tensor: True)
    layers = find_peers(copy)
    forms = {path: layer.gradients for path, layer in layers.items()}
    for layer in layers.values():
        layer.gradients = "dense"
        for module in layer.modules():  # statistics of its own: the copy shares those of `model`
            module._buffers = {name: None if b is None else b.clone() for name, b in module._buffers.items()}

    def before_step(optimizer: Any, _step: int) -> None:
        set_expert_rates(optimizer, expert_rate)
        for layer in layers.values():
            layer.train()

    parts = expert_parts(list(layers.values()))
    train_(
        copy, list(data), data.loss, schedule, progress=progress, name="experts", parts=parts, before_step=before_step
    )
    for path, layer in layers.items():
        layer.gradients = forms[path]
        layer.train(model.training)
    restore_flags_(copy, model)
    return copy


def expert_parts(layers: Sequence[PEER]) -> list[Part]:
    """Experts and keys as a group of an optimizer's own, for `train_`."""
    tables = [tensor for layer in layers for tensor in (layer.down, layer.up, layer.router.keys)]
    return [({"experts": True}, tables)]


def set_expert_rates(optimizer: Any, factor: float) -> None:
    """Multiply the rate of groups of experts, and take their decay away, in place; for `train_`'s ``before_step``."""
    for group in optimizer.param_groups:
        if group.get("experts"):
            group["lr"] *= factor
            group["weight_decay"] = 0.0
