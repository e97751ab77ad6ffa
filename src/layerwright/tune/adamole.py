"""Fine-tune with an adaptive mixture of low-rank experts: the task's loss and a balancing loss (AdaMoLE)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from layerwright.core.calibration import Calibration, LossFunction
from layerwright.core.errors import InputError
from layerwright.nn.expert_routing import ExpertRouting
from layerwright.nn.lora_experts import BalanceOn
from layerwright.tune._loop import Progress, Schedule, opening, train_
from layerwright.tune.mixture import MixtureHandle, attach_lora_mixture

__all__ = ["adamole", "train_mixture_"]


def adamole(
    model: nn.Module,
    calibration: Calibration | Any,
    *,
    teacher: nn.Module | None = None,
    loss_fn: LossFunction | None = None,
    seed: int = 0,
    rank: int = 32,
    num_experts: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.05,
    routing: ExpertRouting = "adaptive",
    top_k: int | None = None,
    max_threshold: float | None = None,
    balance: float = 1e-3,
    balance_on: BalanceOn = "margin",
    targets: str | Sequence[str] | None = None,
    mask_padding: bool = True,
    steps: int = 100,
    learning_rate: float = 1e-4,
    weight_decay: float = 0.0,
    warmup: float = 0.05,
    batches_per_step: int = 1,
    clip: float = 1.0,
    progress: Progress | None = None,
) -> nn.Module:
    """A copy of `model` with a trained mixture of low-rank experts (Liu and Luo, 2024, AdaMoLE, arXiv 2405.00361).

    The adapters stay beside the weights: how they are mixed depends on the input. ``find_mixture(result)`` gives their
    handle; `save_adapter` writes them alone.

    Args:
        model: left untouched; the copy shares the tensors of the frozen weights.
        calibration: batches with labels, or with a loss function.
        teacher: not used; every tuner takes one.
        loss_fn: ``loss_fn(model, batch) -> scalar``, where batches have no labels.
        rank: of all experts of a layer together.
        balance: factor of the sum of the layers' balancing losses (1e-3 in the released configuration), 0 or more.
        num_experts, alpha, dropout, routing, top_k, max_threshold, balance_on, targets, mask_padding: see
            `attach_lora_mixture`. Dropout is drawn from `seed`.
        seed, steps, learning_rate, weight_decay, warmup, batches_per_step, clip: see `Schedule`.
        progress: ``progress(name, done, total)``.

    Raises:
        InputError: as `attach_lora_mixture`, a setting outside its range, a loss that is not finite.
    """
    del teacher
    if not 0 <= balance < float("inf"):
        raise InputError(f"balance: got {balance}, expected 0 or more")
    data, schedule = opening(
        calibration, loss_fn, steps, learning_rate, weight_decay, warmup, batches_per_step, clip, seed
    )
    handle = attach_lora_mixture(
        model,
        targets,
        total_rank=rank,
        num_experts=num_experts,
        alpha=alpha,
        dropout=dropout,
        routing=routing,
        top_k=top_k,
        max_threshold=max_threshold,
        balance_on=balance_on,
        mask_padding=mask_padding,
        seed=seed,
    )

    train_mixture_(handle, data, schedule, balance=balance, progress=progress)
    return handle.model


def train_mixture_(
    handle: MixtureHandle,
    data: Calibration,
    schedule: Schedule,
    *,
    balance: float = 1e-3,
    parameters: Sequence[nn.Parameter] | None = None,
    progress: Progress | None = None,
) -> list[float]:
    """Train the active adapter of `handle`, in place: the task's loss plus `balance` times the balancing loss.

    Args:
        handle: of the model with the mixtures.
        data: batches and their loss.
        schedule: steps, rates and the seed of the batches' order and of dropout.
        balance: 0 or more.
        parameters: to be trained; by default all of the active adapter.
        progress: ``progress(name, done, total)``.

    Returns:
        The loss of each step.

    Raises:
        InputError: nothing to train, or a loss that is not finite.
    """

    def loss_of(running: nn.Module, batch: Any) -> Tensor:
        with handle.learning():
            task = data.loss(running, batch)
            return task + balance * handle.aux_loss().to(task.device) if balance else task

    trained = handle.parameters() if parameters is None else list(parameters)
    device = trained[0].device if trained else torch.device("cpu")
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(schedule.seed)  # dropout; within the fork, so that the caller's generator goes on undisturbed
        losses = train_(
            handle.model, list(data), loss_of, schedule, parameters=trained, progress=progress, name="AdaMoLE"
        )
    handle.reset_usage()
    return losses
