"""Turn a trained model into one whose width each token chooses, under a budget (Adaptive Computation Modules)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from layerwright.core.calibration import Calibration, LossFunction, as_calibration
from layerwright.core.errors import InputError
from layerwright.nn.adaptive import AdaptiveComputationModule
from layerwright.treat.acmize import ACMHandle, FirstWeights, acmize, find_acm
from layerwright.tune._acm_phases import LabelRule, choice_labels, distill_modules_, prefix_errors, pretrain_gates_
from layerwright.tune._loop import Progress, Schedule, opening, restore_flags_, train_, trainable_copy

__all__ = [
    "ACMObjective",
    "LabelRule",
    "acm",
    "choice_labels",
    "distill_modules",
    "prefix_errors",
    "pretrain_gates",
]

SMALLEST_SHARE = 1e-6


class ACMObjective:
    """What is added to the task's loss: a budget for the batch, and that gates do not all choose one thing.

    Args:
        beta: share of all learners' FLOPs that tokens use on average, 0 to 1.
        weights: of the three terms, 0 or more.

    Raises:
        InputError: `beta` or a weight outside its range.
    """

    def __init__(self, beta: float, weights: Sequence[float] = (0.1, 0.05, 0.05)) -> None:
        if not 0 <= beta <= 1:
            raise InputError(f"beta: got {beta}, expected a budget from 0 to 1")
        if len(weights) != 3 or not all(0 <= weight < float("inf") for weight in weights):
            raise InputError(f"weights: got {tuple(weights)}, expected three numbers of 0 or more")
        self.beta, self.weights = beta, tuple(weights)

    def loss(self, handle: ACMHandle) -> Tensor:
        """The weighed sum of `terms`, of the last call."""
        terms = self.terms(handle)
        return torch.stack([weight * term for weight, term in zip(self.weights, terms.values(), strict=True)]).sum()

    def terms(self, handle: ACMHandle) -> dict[str, Tensor]:
        """The three terms of the last call of the model, padding left out.

        ``budget``: ``|sum_l c_l mean(k_l) / sum_l c_l N_l - beta|``, the mean over the batch's tokens, ``c`` the FLOPs of
        a learner. ``entropy``: ``- mean H(p) / log C`` over samples and modules, ``p`` the mean gate of a sample's
        tokens over ``C`` choices. ``diversity``: ``- 2 mean_{i,j} |u_i - u_j|``, ``u`` the mean of ``k / (N + 1)`` over a
        sample's tokens and modules (so the released code; without the ``N + 1`` it outweighs the budget).

        Raises:
            RuntimeError: the last call was not one of learning.
        """
        calls = [(module, _samples(module)) for module in handle.modules.values()]
        return {
            "budget": (_spent_share(calls) - self.beta).abs(),
            "entropy": _entropy(calls),
            "diversity": _diversity(calls),
        }


Call = tuple[AdaptiveComputationModule, tuple[Tensor, Tensor]]
"""A module with its gates ``(batch, tokens, N + 1)`` and which tokens are real ``(batch, tokens)``, as numbers."""


def _samples(module: AdaptiveComputationModule) -> tuple[Tensor, Tensor]:
    last = module.last
    if last is None or last.gates is None:
        raise RuntimeError(
            "no sampled gates: run the model within handle.learning(), or in training mode, before the loss"
        )
    gates = last.gates
    gates = gates[:, None] if gates.dim() == 2 else gates.flatten(1, -2)
    real = torch.ones(gates.shape[:2], device=gates.device) if last.real is None else last.real.to(gates.dtype)
    return gates, real.reshape(gates.shape[:2])


def _numbers(module: AdaptiveComputationModule, gates: Tensor) -> Tensor:
    """``sum_k k g_k``, ``(batch, tokens)``."""
    return gates @ torch.arange(module.num_learners + 1, dtype=gates.dtype, device=gates.device)


def _spent_share(calls: Sequence[Call]) -> Tensor:
    """Share of all learners' FLOPs that real tokens use on average."""
    device = calls[0][1][0].device
    spent = torch.zeros((), device=device)
    whole = 0.0
    for module, (gates, real) in calls:
        mean = (_numbers(module, gates) * real).sum() / real.sum().clamp(min=1)
        spent = spent + module.learner_flops * mean.to(device)
        whole += module.learner_flops * module.num_learners
    return spent / whole


def _entropy(calls: Sequence[Call]) -> Tensor:
    device = calls[0][1][0].device
    shares: list[Tensor] = []
    for module, (gates, real) in calls:
        if module.choices < 2:
            continue
        p = (gates * real[..., None]).sum(1) / real.sum(1, keepdim=True).clamp(min=1)
        p = p[:, module.min_learners :][real.sum(1) > 0]
        entropy = -(p * p.clamp(min=SMALLEST_SHARE).log()).sum(-1)  # clamped: a share of 0 keeps a finite gradient
        shares.append((entropy / torch.tensor(float(module.choices)).log()).mean().to(device))
    return -torch.stack(shares).mean() if shares else torch.zeros((), device=device)


def _diversity(calls: Sequence[Call]) -> Tensor:
    device = calls[0][1][0].device
    sizes = {gates.shape[0] for _, (gates, _) in calls}
    if len(sizes) > 1:
        raise InputError(
            f"diversity: modules see batches of {sorted(sizes)} samples; set its weight to 0 or leave some out"
        )
    own = ((_numbers(module, gates) * real).sum(1) / (module.num_learners + 1) for module, (gates, real) in calls)
    sums = torch.stack([values.to(device) for values in own]).sum(0)
    counts = torch.stack([real.sum(1).to(device) for _, (_, real) in calls]).sum(0)
    u = (sums / counts.clamp(min=1))[counts > 0]
    return -2 * (u[:, None] - u[None]).abs().mean()


def distill_modules(
    original: nn.Module,
    model: nn.Module,
    calibration: Calibration | Any,
    *,
    detach: bool = False,
    loss_fn: LossFunction | None = None,
    seed: int = 0,
    steps: int = 100,
    learning_rate: float = 1e-3,
    batches_per_step: int = 1,
    progress: Progress | None = None,
) -> nn.Module:
    """Phase 1: a copy of `model` whose learners imitate, for every number of them, what they replaced in `original`.

    The mean of ``(h_k(z) - y)^2`` over modules, tokens, ``k`` in 0 to N and features, with ``z`` and ``y`` the input and
    output of the part as `original` runs. Each module learns by itself; padding is left out. Time for a step: a pass of
    `original` and a forward and backward pass of the learners; memory: ``N + 1`` outputs of every module.

    Args:
        original: the model that was acmized.
        model: from `acmize`; left untouched.
        calibration: batches; labels are not needed.
        detach: learner ``n`` learns from ``h_n`` alone.
        loss_fn: runs the model, where batches are of a form of their own.
        seed, steps, learning_rate, batches_per_step: see `Schedule`.
        progress: ``progress(name, done, total)``.

    Raises:
        InputError: a setting outside its range, or no adaptive modules.
    """
    data = as_calibration(calibration, loss_fn)
    schedule = Schedule(steps, learning_rate, batches_per_step=batches_per_step, clip=float("inf"), seed=seed)
    copy, handle = _opened(model)
    distill_modules_(original, handle, data, schedule, detach=detach, progress=progress)
    restore_flags_(copy, model)
    return copy


def pretrain_gates(
    original: nn.Module,
    model: nn.Module,
    calibration: Calibration | Any,
    *,
    threshold: float = 1.2,
    label_rule: LabelRule = "clean",
    loss_fn: LossFunction | None = None,
    seed: int = 0,
    steps: int = 50,
    learning_rate: float = 1e-2,
    batches_per_step: int = 1,
    progress: Progress | None = None,
) -> nn.Module:
    """Phase 2: a copy of `model` whose gates know where the next learner makes the error smaller by `threshold` or more.

    Args:
        original: the model that was acmized.
        model: with learners that were trained; left untouched, and nothing but gates changes in the copy.
        calibration: batches; labels are not needed.
        threshold, label_rule: see `choice_labels`.
        loss_fn, seed, steps, learning_rate, batches_per_step, progress: see `distill_modules`.

    Raises:
        InputError: a setting outside its range, or no adaptive modules.
    """
    data = as_calibration(calibration, loss_fn)
    choice_labels(torch.ones(2), threshold, label_rule)  # refuses settings before anything is copied
    schedule = Schedule(steps, learning_rate, batches_per_step=batches_per_step, clip=float("inf"), seed=seed)
    copy, handle = _opened(model)
    pretrain_gates_(original, handle, data, schedule, threshold=threshold, rule=label_rule, progress=progress)
    restore_flags_(copy, model)
    return copy


def acm(
    model: nn.Module,
    calibration: Calibration | Any,
    *,
    teacher: nn.Module | None = None,
    loss_fn: LossFunction | None = None,
    seed: int = 0,
    budget: float = 0.5,
    targets: str | Sequence[str] = "mlp",
    num_learners: int = 4,
    total_flops: float = 1.0,
    min_learners: int | None = None,
    first_weights: FirstWeights = "random",
    threshold: float = 1.2,
    label_rule: LabelRule = "clean",
    detach: bool = False,
    weights: Sequence[float] = (0.1, 0.05, 0.05),
    distill_steps: int | None = None,
    gate_steps: int | None = None,
    steps: int = 100,
    distill_rate: float = 1e-3,
    pretrain_rate: float = 1e-2,
    learning_rate: float = 1e-4,
    gate_speed: float = 1.0,
    weight_decay: float = 0.0,
    warmup: float = 0.05,
    batches_per_step: int = 1,
    clip: float = 1.0,
    progress: Progress | None = None,
) -> nn.Module:
    """A copy of `model` whose feed-forward parts give each token the width it needs (Wojcik et al., 2023, arXiv 2312.10193).

    Three phases: the learners of each module imitate what they replace (`distill_modules`); the gates learn where the
    next learner helps (`pretrain_gates`); everything is trained on the task, with `ACMObjective`. A model that has
    adaptive modules is trained on as it is: the first two phases then need the original as `teacher`, and are left out
    without it. Memory: four times the parameters in float32.

    Args:
        model: left untouched.
        calibration: batches with labels, or with a loss function.
        teacher: the original of a model that is adaptive already; not used otherwise.
        budget: share of the learners' FLOPs that tokens use on average, 0 to 1.
        targets, num_learners, total_flops, min_learners, first_weights: see `acmize`.
        threshold, label_rule: see `choice_labels`.
        detach: see `distill_modules`.
        weights: see `ACMObjective`.
        distill_steps, gate_steps: of the first two phases; None for as many as `steps`, and for half of them.
        distill_rate, pretrain_rate: their highest learning rates.
        gate_speed: in the last phase gates learn at so many times the rate.
        loss_fn: ``loss_fn(model, batch) -> scalar``, where batches have no labels.
        seed: of first weights, the order of batches and the samples of the gates.
        steps, learning_rate, weight_decay, warmup, batches_per_step, clip: of the last phase; see `Schedule`.
        progress: ``progress(name, done, total)``.

    Raises:
        InputError, TypeError: a setting outside its range, a budget below what `min_learners` takes, or a model without
            parts that can be replaced.
    """
    data, schedule = opening(
        calibration, loss_fn, steps, learning_rate, weight_decay, warmup, batches_per_step, clip, seed
    )
    objective = ACMObjective(budget, weights)
    choice_labels(torch.ones(2), threshold, label_rule)
    if not gate_speed > 0:
        raise InputError(f"gate_speed: got {gate_speed}, expected above 0")
    first = steps if distill_steps is None else distill_steps
    second = max(1, steps // 2) if gate_steps is None else gate_steps
    if first < 0 or second < 0:
        raise InputError(f"distill_steps, gate_steps: got {first} and {second}, expected 0 or more")
    original, adaptive = teacher, model
    if find_acm(model) is None:
        settings: dict[str, Any] = {"total_flops": total_flops, "min_learners": min_learners, "seed": seed}
        adaptive, _ = acmize(model, targets, num_learners, first_weights=first_weights, **settings)
        original = model
    copy, handle = _opened(adaptive)
    least = _least_share(handle)
    if budget < least:
        raise InputError(
            f"budget: got {budget}, but min_learners alone takes {least:.3g}; raise it or use more learners"
        )
    common: dict[str, Any] = {"batches_per_step": batches_per_step, "clip": float("inf"), "seed": seed}
    if original is not None and first:
        plan = Schedule(first, distill_rate, **common)
        distill_modules_(original, handle, data, plan, detach=detach, progress=progress)
    if original is not None and second:
        plan = Schedule(second, pretrain_rate, **common)
        pretrain_gates_(original, handle, data, plan, threshold=threshold, rule=label_rule, progress=progress)
    _train_whole_(handle, data, schedule, objective, gate_speed, seed, progress)
    handle.reset()
    restore_flags_(copy, model)
    return copy


def _train_whole_(
    handle: ACMHandle,
    data: Calibration,
    schedule: Schedule,
    objective: ACMObjective,
    gate_speed: float,
    seed: int,
    progress: Progress | None,
) -> None:
    """Phase 3, in place: the task's loss and the objective."""

    def loss_of(network: nn.Module, batch: Any) -> Tensor:
        with handle.learning(seed):
            return data.loss(network, batch) + objective.loss(handle)

    def before_step(optimizer: Any, _step: int) -> None:
        for group in optimizer.param_groups:
            if group.get("gate"):
                group["lr"] *= gate_speed

    handle.calls.number = 0
    gates = [p for module in handle.modules.values() for p in module.gate.parameters() if p.requires_grad]
    train_(
        handle.model,
        list(data),
        loss_of,
        schedule,
        progress=progress,
        name="adaptive width",
        parts=[({"gate": True}, gates)],
        before_step=before_step,
    )


def _opened(model: nn.Module) -> tuple[nn.Module, ACMHandle]:
    """A copy that can be trained, and its handle."""
    copy = trainable_copy(model, lambda _name, _tensor: True)
    return copy, ACMHandle(copy)


def _least_share(handle: ACMHandle) -> float:
    modules = handle.modules.values()
    whole = sum(module.learner_flops * module.num_learners for module in modules)
    return sum(module.learner_flops * module.min_learners for module in modules) / whole
