"""Distillation: bring a treated model close to its original, through the logits or block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwright.core.blocks import Blocks
from layerwright.core.calibration import Calibration, LossFunction, evaluating, logits_of
from layerwright.core.capture import first_tensor
from layerwright.core.errors import InputError, unknown_name
from layerwright.core.lockstep import Call, Lockstep
from layerwright.core.option import Scores
from layerwright.score.costs import find_blocks_or_none
from layerwright.score.inputs import forwards
from layerwright.tune._loop import Progress, opening, restore_flags_, train_, trainable_copy
from layerwright.tune.lora import Adapted, attach_lora

__all__ = ["distill", "distill_layers", "logit_divergence"]

Parameters = Literal["all", "norms", "lora"]
_KINDS = ("all", "norms", "lora")


def distill(
    model: nn.Module,
    calibration: Calibration | Any,
    *,
    teacher: nn.Module | None = None,
    loss_fn: LossFunction | None = None,
    seed: int = 0,
    parameters: Parameters = "lora",
    temperature: float = 1.0,
    hidden_weight: float = 0.0,
    pairs: Mapping[str, str] | None = None,
    rank: int = 8,
    alpha: float = 16.0,
    sensitivities: Scores | Mapping[str, float] | None = None,
    merge: bool = True,
    dequantize: bool = False,
    steps: int = 100,
    learning_rate: float = 1e-4,
    weight_decay: float = 0.0,
    warmup: float = 0.05,
    batches_per_step: int = 1,
    clip: float = 1.0,
    progress: Progress | None = None,
) -> nn.Module:
    """A copy of `model`, trained to give the logits of `teacher`: ``KL(teacher || model)`` per token.

    With `hidden_weight` the outputs of paired blocks are drawn together too, by their mean squared difference over
    the teacher's mean square. No labels are needed. Source: Hinton et al. (2015), arXiv 1503.02531. The teacher runs
    once per step; memory: both models and the trained parameters four times in float32.

    Args:
        model: left untouched.
        calibration: batches; labels are ignored, and so are positions that an attention mask leaves out.
        teacher: the original; its logits must have the shape of the model's.
        loss_fn: how batches of a form of one's own are fed is not known to it: give mappings, tensors or pairs.
        parameters: ``lora`` (adapters), ``norms`` (all vectors: norms, biases, scales) or ``all``.
        temperature: both distributions are softened by it; the loss is scaled by its square.
        hidden_weight: of the blocks' outputs, 0 or more.
        pairs: block of the model to block of the teacher. By default blocks are paired in order in stacks of equal
            depth, and only the last ones where blocks were dropped.
        rank, alpha, sensitivities, merge, dequantize: of the adapters, see `lora`.
        seed, steps, learning_rate, weight_decay, warmup, batches_per_step, clip: see `Schedule`.
        progress: ``progress(name, done, total)``.

    Raises:
        InputError: no teacher, logits of different shapes, a setting outside its range, a loss that is not finite.
    """
    teacher = _require(teacher, parameters)
    if temperature <= 0 or hidden_weight < 0:
        raise InputError("temperature must be > 0 and hidden_weight >= 0")
    data, schedule = opening(
        calibration, loss_fn, steps, learning_rate, weight_decay, warmup, batches_per_step, clip, seed
    )
    running, finish = _trainable(
        model,
        parameters,
        rank=rank,
        alpha=alpha,
        sensitivities=sensitivities,
        merge=merge,
        dequantize=dequantize,
        seed=seed,
    )
    inner = running.copy if isinstance(running, Adapted) else running
    outer = running.model if isinstance(running, Adapted) else running
    paired = _paired(inner, teacher, pairs) if hidden_weight else {}

    def loss_of(student: nn.Module, batch: Any) -> Tensor:
        with watching(teacher, list(paired.values())) as seen, torch.no_grad():
            goal = _logits(data, teacher, batch)
        with watching(inner, list(paired)) as found:
            logits = _logits(data, student, batch)
        loss = logit_divergence(goal, logits, temperature, _kept(batch))
        for own, other in paired.items():
            loss = loss + hidden_weight / len(paired) * _relative_error(found[own], seen[other])
        return loss

    with evaluating(teacher):
        train_(outer, list(data), loss_of, schedule, progress=progress, name="distilling")
    return finish()


def distill_layers(
    model: nn.Module,
    calibration: Calibration | Any,
    *,
    teacher: nn.Module | None = None,
    loss_fn: LossFunction | None = None,
    seed: int = 0,
    parameters: Parameters = "norms",
    blocks: Sequence[str] | None = None,
    pairs: Mapping[str, str] | None = None,
    rank: int = 8,
    alpha: float = 16.0,
    merge: bool = True,
    dequantize: bool = False,
    steps: int = 20,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.0,
    warmup: float = 0.05,
    batches_per_step: int = 1,
    clip: float = 1.0,
    progress: Progress | None = None,
) -> nn.Module:
    """A copy of `model` whose blocks, one after the other, are trained to give what the teacher's block gives.

    Each block sees the inputs that come out of the blocks before it, trained already; its goal is the output of the
    teacher's block on those very inputs. One pass over the data in all, besides the training of single blocks.
    Memory: one set of activations, the goals of one block, and the trained parameters of the model.

    Args:
        model: left untouched.
        calibration: batches, without labels.
        teacher: the original.
        parameters: as in `distill`.
        blocks: paths of the blocks to train; by default all that have a partner.
        pairs: block of the model to block of the teacher; by default in order, in stacks of equal depth.
        steps: for each block. The other settings are those of `distill`.

    Raises:
        InputError: no teacher, an unknown block, no block with a partner, a loss that is not finite.
    """
    teacher = _require(teacher, parameters)
    data, schedule = opening(
        calibration, loss_fn, steps, learning_rate, weight_decay, warmup, batches_per_step, clip, seed
    )
    running, finish = _trainable(
        model, parameters, rank=rank, alpha=alpha, sensitivities=None, merge=merge, dequantize=dequantize, seed=seed
    )
    inner = running.copy if isinstance(running, Adapted) else running
    paired = _paired(inner, teacher, pairs, last_only=False)
    for path in blocks or ():
        if path not in paired:
            raise unknown_name("block", path, paired, "the pairs of blocks (give pairs= where blocks were dropped)")
    chosen = [path for path in paired if blocks is None or path in blocks]
    if not chosen:
        raise InputError("no block has a partner in the teacher: give pairs={block of the model: block of the teacher}")
    with torch.no_grad(), evaluating(inner), evaluating(teacher):
        for number, stop in enumerate(Lockstep(inner, chosen, forwards(inner, data))):
            block = inner.get_submodule(stop.path)
            trained = [p for p in block.parameters() if p.requires_grad]
            if stop.visit == 0 and trained:
                original = teacher.get_submodule(paired[stop.path])
                goals = [first_tensor(original(*call.args, **call.kwargs)).detach() for call in stop.calls]

                def loss_of(
                    _block: nn.Module, item: tuple[Call, Tensor], run: Callable[[Call], Any] = stop.run
                ) -> Tensor:
                    return _relative_error(first_tensor(run(item[0])), item[1])

                items = list(zip(stop.calls, goals, strict=True))
                train_(block, items, loss_of, schedule, parameters=trained, name=stop.path, distributed=False)
            if progress:
                progress("distilling blocks", number + 1, len(chosen))
    return finish()


def logit_divergence(goal: Tensor, logits: Tensor, temperature: float = 1.0, kept: Tensor | None = None) -> Tensor:
    """``KL(softmax(goal) || softmax(logits))`` averaged over all positions, in nats, float32.

    Args:
        goal: the teacher's logits ``(..., classes)``.
        logits: of the same shape.
        temperature: divides both; the result is multiplied by its square.
        kept: bool ``(...)``; positions that count.

    Raises:
        InputError: the shapes differ.
    """
    if goal.shape != logits.shape:
        raise InputError(
            f"teacher: its logits are {tuple(goal.shape)}, the model's {tuple(logits.shape)}; they must agree"
        )
    wanted = F.log_softmax(goal.float() / temperature, -1)
    given = F.log_softmax(logits.float() / temperature, -1)
    divergence = (wanted.exp() * (wanted - given)).sum(-1)
    if kept is not None and kept.shape == divergence.shape:
        divergence = divergence[kept]
    return temperature**2 * divergence.mean()


def _require(teacher: nn.Module | None, parameters: str) -> nn.Module:
    if teacher is None:
        raise InputError("teacher: distillation needs the original model; pass teacher=, or tune with lora or full")
    if parameters not in _KINDS:
        raise unknown_name("kind of parameters", parameters, _KINDS)
    return teacher


def _trainable(
    model: nn.Module,
    parameters: str,
    *,
    rank: int,
    alpha: float,
    sensitivities: Scores | Mapping[str, float] | None,
    merge: bool,
    dequantize: bool,
    seed: int,
) -> tuple[nn.Module | Adapted, Callable[[], nn.Module]]:
    """The copy to train, and what makes of it the model to hand back."""
    if parameters == "lora":
        adapted = attach_lora(
            model, rank=rank, alpha=alpha, seed=seed, sensitivities=sensitivities, merge=merge and not dequantize
        )
        return adapted, partial(adapted.handed_back, model, merge=merge, dequantize=dequantize)
    copy = trainable_copy(model, lambda _name, tensor: parameters == "all" or tensor.dim() <= 1)

    def plain() -> nn.Module:
        restore_flags_(copy, model)
        return copy

    return copy, plain


def _paired(
    model: nn.Module, teacher: nn.Module, pairs: Mapping[str, str] | None, *, last_only: bool = True
) -> dict[str, str]:
    stacks: tuple[tuple[Blocks, ...], ...] = (find_blocks_or_none(model), find_blocks_or_none(teacher))
    if pairs is not None:
        for side, names, paths in (("model", pairs.keys(), stacks[0]), ("teacher", pairs.values(), stacks[1])):
            known = [name for stack in paths for name in stack]
            for name in names:
                if name not in known:
                    raise unknown_name("block", name, known, f"pairs ({side})")
        return dict(pairs)
    found: dict[str, str] = {}
    for own, other in zip(*stacks, strict=False):
        if len(own) == len(other):
            found |= dict(zip(own.names, other.names, strict=True))
        elif last_only:
            found[own.names[-1]] = other.names[-1]
    return found


@contextmanager
def watching(model: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Within the context the output of each of `paths`, with its gradient, is kept under its path."""
    seen: dict[str, Tensor] = {}

    def keep(path: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            seen[path] = first_tensor(output)

        return hook

    handles = [model.get_submodule(path).register_forward_hook(keep(path)) for path in paths]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _logits(data: Calibration, model: nn.Module, batch: Any) -> Tensor:
    logits = logits_of(data.forward(model, batch))
    if logits.dim() < 2:
        raise InputError("distill: this model and data give no logits; batches must be mappings, tensors or pairs")
    return logits


def _kept(batch: Any) -> Tensor | None:
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) else None


def _relative_error(output: Tensor, goal: Tensor) -> Tensor:
    difference = (output.float() - goal.float()).pow(2).mean()
    return difference / goal.float().pow(2).mean().clamp(min=1e-12)
