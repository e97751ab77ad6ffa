"""Train a model whose tokens may skip feed-forward parts: labels from similarity, one budget over all blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwright.core.blocks import find_blocks
from layerwright.core.calibration import Calibration, LossFunction
from layerwright.core.errors import InputError, unknown_name
from layerwright.nn.gates import top_tokens
from layerwright.nn.routed import Variant
from layerwright.treat.expand import Init, expand_blocks
from layerwright.treat.route import DLOHandle, find_routing, route_tokens
from layerwright.tune._loop import Progress, opening, restore_flags_, train_, trainable_copy

__all__ = ["DLOObjective", "LabelMode", "capacity_learning_rates", "dlo", "run_labels"]

LabelMode = Literal["cos-global", "cos", "self"]
ANNEAL_STEPS = 1000


def run_labels(similarity: Tensor, real: Tensor, share: float | Sequence[float]) -> Tensor:
    """Which tokens a block ought to run: those whose hidden states it turns most.

    Args:
        similarity: cosine without and with the block's part, ``(routers, batch, tokens)``.
        real: tokens that are no padding, ``(batch, tokens)``; padding never ought to run.
        share: one number: the ``ceil(share * routers * real tokens)`` least similar of all blocks together. Several:
            so many of each block, by its own share. What ties with the last one counts too.

    Returns:
        Boolean, ``(routers, batch, tokens)``.
    """
    if isinstance(share, float | int):
        return top_tokens(-similarity, share, real)
    return torch.stack([top_tokens(-own, part, real) for own, part in zip(similarity, share, strict=True)])


class DLOObjective:
    """The routers' loss, and the capacities of the blocks that follow from it (Tan et al., 2024, DLO).

    Begin with `begin`. In each step: the model runs within ``handle.learning()`` (or in training mode), `loss` is added
    to the model's own, and `step` follows the optimizer's.

    Args:
        target_capacity: mean share of tokens that run in the end, above 0 and at most 1.
        mode: what the routers learn: ``cos-global``, the least similar tokens of all blocks together, so that blocks
            get unequal shares; ``cos``, those of each block; ``self``, what they chose.
        coefficient: of the routers' loss.
        anneal_steps: steps in which the mean capacity falls from 1 to the target.
        count_padding: padding counts in the mean, as tokens not to run (so the released code); False leaves it out.

    Raises:
        InputError: a setting outside its range.
    """

    def __init__(
        self,
        target_capacity: float = 0.9,
        mode: LabelMode = "cos-global",
        coefficient: float = 1.0,
        anneal_steps: int = ANNEAL_STEPS,
        count_padding: bool = False,
    ) -> None:
        if not 0 < target_capacity <= 1:
            raise InputError(f"target_capacity: got {target_capacity}, expected above 0 and at most 1")
        if mode not in get_args(LabelMode):
            raise unknown_name("mode", str(mode), get_args(LabelMode))
        if not coefficient >= 0 or anneal_steps < 0:
            raise InputError(f"coefficient, anneal_steps: got {coefficient} and {anneal_steps}, expected 0 or more")
        self.target_capacity, self.mode, self.coefficient = target_capacity, mode, coefficient
        self.anneal_steps, self.count_padding = anneal_steps, count_padding
        self.steps = 0
        self._handle: DLOHandle | None = None
        self._shares: list[Tensor] = []

    def mean_capacity(self, step: int) -> float:
        """Mean share of tokens that run at `step` (0-based)."""
        done = 1.0 if step >= self.anneal_steps else step / self.anneal_steps
        return 1.0 + done * (self.target_capacity - 1.0)

    def begin(self, handle: DLOHandle) -> None:
        """Set the capacities of the first step."""
        self.steps, self._handle, self._shares = 0, handle, []
        handle.capacity = [self.mean_capacity(0)] * len(handle.blocks)

    def loss(self, handle: DLOHandle, attention_mask: Tensor | None = None) -> Tensor:
        """``coefficient`` times the mean binary cross-entropy of the last call's scores, over blocks and tokens.

        Args:
            handle: of the model that ran.
            attention_mask: ``(batch, tokens)``; None takes the one that the model was given.

        Raises:
            RuntimeError: the last call was not one of learning, or recorded no similarities.
        """
        calls = handle.last
        similarity = handle.last_similarity
        if calls is None or not all(call.learning for call in calls) or (self.mode != "self" and similarity is None):
            raise RuntimeError(
                "no recorded similarities: run the model within handle.learning(), or in training mode, before the loss"
            )
        scores = torch.stack([call.scores for call in calls])
        real = calls[0].real if attention_mask is None else attention_mask.bool().to(scores.device)
        labels = self._labels(handle, similarity, torch.stack([call.mask for call in calls]), real) & real
        self._handle = handle
        self._shares.append((labels.sum((1, 2)) / real.sum()).double().cpu())
        every = F.binary_cross_entropy(scores, labels.to(scores.dtype), reduction="none")
        return self.coefficient * (every.mean() if self.count_padding else every[real.expand(every.shape)].mean())

    def _labels(self, handle: DLOHandle, similarity: Tensor | None, mask: Tensor, real: Tensor) -> Tensor:
        if self.mode == "self" or similarity is None:
            return mask
        return run_labels(
            similarity, real, self.target_capacity if self.mode == "cos-global" else handle.capacity.tolist()
        )

    def step(self) -> None:
        """Set the capacities of the next step: shares of label 1, brought to the mean that the annealing asks for.

        Several losses since the last step, and several processes, are averaged.
        """
        self.steps += 1
        handle = self._handle
        if handle is None:
            return
        wanted = self.mean_capacity(self.steps)
        shares = torch.ones(len(handle.blocks), dtype=torch.float64)
        if self.mode == "cos-global" and self._shares:
            shares = _over_processes(torch.stack(self._shares).mean(0))
        self._shares = []
        handle.capacity = shares * (wanted / shares.mean())


def _over_processes(values: Tensor) -> Tensor:
    """The mean over processes that train together."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return values
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    total = values.to(device)
    torch.distributed.all_reduce(total)
    return total.cpu() / torch.distributed.get_world_size()


def capacity_learning_rates(optimizer: Any, capacity: Tensor | Sequence[float]) -> list[float]:
    """Learning rates by block, in place: ``rate * (c + 1 - mean(c))``, so that blocks that run more tokens learn faster.

    A group whose ``"block"`` is ``l`` gets the rate of capacity ``c_l``; the rate itself is that of the groups without
    one. So calling it after every step of a scheduler does not compound. The mean over blocks is the rate.

    Args:
        optimizer: of torch, with a group for each block and at least one other.
        capacity: ``(blocks,)``.

    Returns:
        The rate of each block.

    Raises:
        InputError: no group without a block, or a block without a capacity.
    """
    shares = [float(value) for value in capacity]
    plain = [group["lr"] for group in optimizer.param_groups if group.get("block") is None]
    if not plain:
        raise InputError("optimizer: every group belongs to a block; one without says what the rate is")
    mean = math.fsum(shares) / max(len(shares), 1)
    rates = [plain[0] * (share + 1 - mean) for share in shares]
    for group in optimizer.param_groups:
        number = group.get("block")
        if number is None:
            continue
        if not 0 <= number < len(rates):
            raise InputError(f"optimizer: a group has block {number}, capacities are given for {len(rates)} blocks")
        group["lr"] = rates[number]
    return rates


def dlo(
    model: nn.Module,
    calibration: Calibration | Any,
    *,
    teacher: nn.Module | None = None,
    loss_fn: LossFunction | None = None,
    seed: int = 0,
    num_new: int | None = None,
    init: Init = "identity",
    variant: Variant = "mlp",
    target_capacity: float = 0.9,
    mode: LabelMode = "cos-global",
    coefficient: float = 1.0,
    anneal_steps: int | None = None,
    scale: float = 2.0,
    gap: float = 0.05,
    router_rate: float = 1.0,
    blocks: Sequence[str] | Sequence[int] | None = None,
    steps: int = 100,
    learning_rate: float = 2e-5,
    weight_decay: float = 0.0,
    warmup: float = 0.03,
    batches_per_step: int = 1,
    clip: float = 1.0,
    progress: Progress | None = None,
) -> nn.Module:
    """A deeper copy of `model` in which tokens skip feed-forward parts, after fine-tuning (Tan et al., 2024, DLO, arXiv 2407.11030).

    New blocks begin as identities, every block gets a router, and all weights are trained on the labels while the
    routers learn which tokens each block turns most. A model that has routers is trained on as it is. Memory: four
    times the parameters in float32; time: what skipped tokens would have taken, once more and without gradients.

    Args:
        model: left untouched.
        calibration: batches with labels, or with a loss function.
        teacher: not used; every tuner takes one.
        num_new: new blocks (see `expand_blocks`), 0 for none; None puts one behind every four blocks or so.
        init: how new blocks begin.
        variant, scale, gap, blocks: see `route_tokens`; `blocks` are those of the deeper model.
        target_capacity, mode, coefficient: see `DLOObjective`.
        router_rate: routers learn at so many times the rate. They begin at zero and have no bias: in a short training at
            the common rate they are left close to it, and tell tokens badly.
        anneal_steps: None for 1000, or half of the steps if that is less.
        loss_fn: ``loss_fn(model, batch) -> scalar``, where batches have no labels.
        seed, steps, learning_rate, weight_decay, warmup, batches_per_step, clip: see `Schedule`.
        progress: ``progress(name, done, total)``.

    Raises:
        InputError, TypeError: a setting outside its range, or a model that cannot be expanded or routed.
    """
    del teacher
    data, schedule = opening(
        calibration, loss_fn, steps, learning_rate, weight_decay, warmup, batches_per_step, clip, seed
    )
    if not router_rate > 0:
        raise InputError(f"router_rate: got {router_rate}, expected above 0")
    annealing = min(ANNEAL_STEPS, steps // 2) if anneal_steps is None else anneal_steps
    objective = DLOObjective(target_capacity, mode, coefficient, annealing)
    routed = model
    if find_routing(model) is None:
        new = _number_new(model) if num_new is None else num_new
        deeper = expand_blocks(model, new, init=init, seed=seed)[0] if new != 0 else model
        routed = route_tokens(deeper, blocks, variant=variant, scale=scale, gap=gap).model
    copy = trainable_copy(routed, lambda _name, _tensor: True)
    handle = find_routing(copy)
    assert handle is not None
    objective.begin(handle)

    def loss_of(network: nn.Module, batch: Any) -> Tensor:
        with handle.learning(similarity=mode != "self"):
            return data.loss(network, batch) + objective.loss(handle)

    def before_step(optimizer: Any, step: int) -> None:
        if step:
            objective.step()
        capacity_learning_rates(optimizer, handle.capacity)
        for group in optimizer.param_groups:
            if group.get("router"):
                group["lr"] *= router_rate

    routers = [
        parameter for routing in handle.routings for parameter in routing.parameters() if parameter.requires_grad
    ]
    train_(
        copy,
        list(data),
        loss_of,
        schedule,
        progress=progress,
        name="dynamic layers",
        parts=[
            *(({"block": number}, _parameters(handle, number)) for number in range(len(handle.blocks))),
            ({"router": True}, routers),
        ],
        before_step=before_step,
    )
    handle.reset()
    for routing in handle.routings:
        routing.last = None
    restore_flags_(copy, model)
    return copy


def _parameters(handle: DLOHandle, number: int) -> list[nn.Parameter]:
    """What belongs to a routed block, without its router."""
    routers = {id(parameter) for parameter in handle.routings[number].parameters()}
    block = handle.model.get_submodule(handle.blocks[number])
    return [parameter for parameter in block.parameters() if id(parameter) not in routers and parameter.requires_grad]


def _number_new(model: nn.Module) -> int:
    """The largest divisor of the depth that is at most a quarter of it, at least 1."""
    depth = len(find_blocks(model)[0])
    return max(number for number in range(1, max(1, depth // 4) + 1) if depth % number == 0)
