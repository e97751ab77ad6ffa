"""Train some blocks and the readout of a model, and nothing else (SubTuning)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from layerwright.core.block_paths import check_block_paths, inside_any
from layerwright.core.layers import list_layers
from layerwright.tune._loop import Schedule, train_, trainable_copy

__all__ = ["Subset", "subset_copy", "subtune", "train_subset_"]

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Subset:
    """What is trained of a model.

    Attributes:
        model: whose parts they are.
        trained: paths of the blocks and of the readout.
        norms: paths of further norm layers that are trained.
    """

    model: nn.Module
    trained: tuple[str, ...]
    norms: tuple[str, ...] = ()

    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters, tied ones once."""
        return [p for n, p in self.model.named_parameters() if inside_any(n, (*self.trained, *self.norms))]

    def set_modes_(self) -> None:
        """Training mode for what is trained, evaluation mode for the rest: its dropout and statistics stay fixed."""
        self.model.eval()
        for path in (*self.trained, *self.norms):
            self.model.get_submodule(path).train()


@contextmanager
def subtune(
    model: nn.Module, blocks: Sequence[str], head: str | None = None, freeze_norm: bool = True
) -> Iterator[Subset]:
    """Context: only `blocks` and `head` of `model` can be trained (Kaplun et al., 2023, arXiv 2302.06354).

    Their parameters require gradients and they are in training mode, so that their batch norms learn statistics; all
    else is frozen and in evaluation mode, so that its tensors stay the same bit by bit. Flags and modes are put back
    on leaving, also after an exception. Weights are not.

    Args:
        model: its flags and modes are changed within the context.
        blocks: paths of modules, none inside another; none at all is linear probing.
        head: path of the readout, trained always; None if there is none to train.
        freeze_norm: norm layers outside the blocks are frozen too; False trains them all.

    Raises:
        InputError: blocks that are unknown, overlap, or share weights with what is frozen.
    """
    chosen = check_block_paths(blocks)
    trained = check_block_paths(chosen if head is None else (*chosen, head), model)
    norms: tuple[str, ...] = ()
    if not freeze_norm:
        found = (ref.path for ref in list_layers(model) if ref.kind == "norm")
        norms = tuple(path for path in found if not inside_any(path, trained))
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    subset = Subset(model, trained, norms)
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for parameter in subset.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        subset.set_modes_()
        yield subset
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def subset_copy(model: M, blocks: Sequence[str]) -> M:
    """A copy of `model` in which `blocks` have tensors of their own and all else shares memory with `model`.

    Memory: one copy of the blocks.

    Raises:
        InputError: blocks that are unknown, overlap, or share weights with others.
    """
    paths = check_block_paths(blocks, model)
    copy = trainable_copy(model, lambda name, _tensor: inside_any(name, paths))
    for path in paths:
        for module in copy.get_submodule(path).modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.detach().clone()
    return copy


def train_subset_(
    model: nn.Module,
    blocks: Sequence[str],
    head: str | None,
    items: Sequence[Any],
    loss_of: Callable[[nn.Module, Any], Tensor],
    schedule: Schedule,
    *,
    freeze_norm: bool = True,
    head_rate: float = 1.0,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[float]:
    """Train `blocks` and `head` of `model` in place, within `subtune`; returns the loss of each step.

    The readout learns at `head_rate` times the rate. Dropout of the trained blocks draws from the schedule's seed; the
    state of torch's generators is put back.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with (
        subtune(model, blocks, head, freeze_norm) as subset,
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
    ):
        torch.manual_seed(schedule.seed)

        def before_step(optimizer: Any, _step: int) -> None:
            subset.set_modes_()
            for group in optimizer.param_groups:
                group["lr"] *= head_rate if group.get("readout") else 1.0

        readout = [] if head is None else list(model.get_submodule(head).parameters())
        return train_(
            model,
            items,
            loss_of,
            schedule,
            parameters=subset.parameters(),
            progress=progress,
            name="training the chosen blocks",
            distributed=False,
            parts=[({"readout": True}, readout)],
            before_step=before_step,
        )
