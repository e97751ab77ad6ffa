"""Several tasks on one backbone: what they share is computed once, or with their activations stacked (SubTuning)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from layerwright.core.block_paths import check_block_paths, inside_any
from layerwright.core.blocks import find_blocks
from layerwright.core.calibration import logits_of
from layerwright.core.errors import InputError, unknown_name
from layerwright.core.layers import parameter_bytes, structure_copy
from layerwright.core.readout import find_readout
from layerwright.score.costs import count_flops
from layerwright.treat._branching import Branching, BranchState, Readouts, groups_after, intercept_

__all__ = ["BASE", "BlockSharing", "MultiTaskModel", "TaskBranch", "task_branch"]

BASE = "base"
"""The name of the task that the backbone was trained on."""


@dataclass(frozen=True)
class TaskBranch:
    """What one task has of its own.

    Attributes:
        blocks: tensors by name inside the block, for each block that was tuned, by its path. A part of a block can
            stand for a block: the block then branches, with the other tensors in common.
        head: the task's readout.
    """

    blocks: Mapping[str, Mapping[str, Tensor]]
    head: nn.Module


@dataclass(frozen=True)
class BlockSharing:
    """How tasks share a block.

    Attributes:
        block: its path.
        weights: tasks in groups that have the block's weights in common; each group is one call of the block.
        inputs: tasks in groups whose activations are still the same before it.
        kind: ``shared`` (one input, one call), ``stacked`` (several inputs on the batch axis, one call), or
            ``branched`` (several calls).
    """

    block: str
    weights: tuple[tuple[str, ...], ...]
    inputs: tuple[tuple[str, ...], ...]
    kind: Literal["shared", "stacked", "branched"]


def task_branch(
    base: nn.Module, tuned: nn.Module, blocks: Sequence[str] | None = None, head: str | None = None
) -> TaskBranch:
    """What `tuned` has of its own against `base`: the blocks that differ, and its readout.

    Args:
        base: the backbone.
        tuned: a copy of it after training some blocks and a new readout.
        blocks: paths of units, None for the blocks that are found.
        head: path of the readout, None to find it.

    Raises:
        InputError: a tensor outside the blocks and the readout differs, so that the backbone cannot be shared.
    """
    readout = find_readout(base, head)
    units = check_block_paths(_units(base) if blocks is None else blocks, base)
    known = dict(base.state_dict())
    own: set[str] = set()
    for name, tensor in tuned.state_dict().items():
        if inside_any(name, (readout,)):
            continue
        same = name in known and known[name].shape == tensor.shape and torch.equal(known[name], tensor)
        unit = next((unit for unit in units if inside_any(name, (unit,))), None)
        if not same and unit is None:
            raise InputError(
                f"tasks: {name} differs from the backbone's and is in no block; name its module in blocks="
            )
        if not same and unit is not None:
            own.add(unit)
    states = {unit: dict(tuned.get_submodule(unit).state_dict()) for unit in units if unit in own}
    return TaskBranch(states, tuned.get_submodule(readout))


class MultiTaskModel(nn.Module):
    """A backbone with several tasks, each with a few blocks of its own, in one forward (Kaplun et al., 2023).

    Before the first block that differs there is one activation. A block that tasks have in common runs once, with
    their activations stacked on the batch axis: its weights are read once, which is most of its time in small batches.
    Only blocks of a task's own run for it alone. The backbone's own forward runs, so what stands between blocks and
    behind them must treat samples independently. For inference; it shares its tensors with `base`.

    Args:
        base: a classifier; left untouched.
        tasks: by name, a `TaskBranch` or ``(blocks, head)``.
        blocks: paths of units in the order of execution; None takes those that are found, and those of `tasks`.
        head: path of the readout; None finds it.

    Raises:
        InputError: blocks that are not in `base`, other shapes or names of tensors, or a task without a name.
    """

    def __init__(
        self,
        base: nn.Module,
        tasks: Mapping[str, TaskBranch | tuple[Mapping[str, Mapping[str, Tensor]], nn.Module]],
        blocks: Sequence[str] | None = None,
        head: str | None = None,
    ) -> None:
        super().__init__()
        self.head = find_readout(base, head)
        given = {name: task if isinstance(task, TaskBranch) else TaskBranch(*task) for name, task in tasks.items()}
        self.blocks = _all_units(base, blocks, given)
        self.base = structure_copy(base).eval()
        self.tasks = (BASE, *given)
        self.own = nn.ModuleList()
        self.heads = nn.ModuleList()
        self._places: dict[tuple[str, str], int] = {}
        for name, task in given.items():
            self._add(name, task, base)
        self._state = BranchState()
        for block in self.blocks:
            module = self.base.get_submodule(block)
            own = {name: self.own[place] for (name, path), place in self._places.items() if path == block}
            intercept_(module, Branching(self._state, module.forward, own))
        readout = self.base.get_submodule(self.head)
        answers = zip(self.tasks, (readout.forward, *self.heads), strict=True)
        intercept_(readout, Readouts(self._state, self.head, dict(answers)))
        self.eval()

    def _add(self, name: str, task: TaskBranch, base: nn.Module) -> None:
        if not name or name == BASE:
            raise InputError(f"tasks: got the name {name!r}; use another one than {BASE!r}, the backbone's own")
        for path, state in task.blocks.items():
            block = next(unit for unit in self.blocks if inside_any(path, (unit,)))
            if (name, block) not in self._places:
                self._places[name, block] = len(self.own)
                self.own.append(structure_copy(base.get_submodule(block)))
            module = self.own[self._places[name, block]].get_submodule(path[len(block) + 1 :])
            _load_(module, state, f"tasks: {name}, {path}")
        width = getattr(base.get_submodule(self.head), "in_features", None)
        if getattr(task.head, "in_features", width) != width:
            raise InputError(f"tasks: the readout of {name} takes another width than {width}, the backbone's")
        self.heads.append(structure_copy(task.head))

    def forward(self, x: Any, tasks: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Logits ``(batch, classes of the task)`` by task.

        Args:
            x: a tensor ``(batch, ...)``, or a mapping of arguments.
            tasks: which ones, None for all, the backbone's own among them.

        Raises:
            InputError: an unknown task, or a backbone that does more than its readout behind the blocks.
        """
        wanted = self._wanted(tasks)
        rows = len(next(v for v in (x.values() if isinstance(x, Mapping) else [x]) if isinstance(v, Tensor)))
        with self._state.running(wanted, rows):
            output = self.base(**x) if isinstance(x, Mapping) else self.base(x)
            answers = self._state.answers
            if set(answers) != set(wanted) or logits_of(output) is not self._state.returned:
                raise InputError(
                    f"tasks: {type(self.base).__name__} does more with its readout {self.head} than return its output"
                )
        return {name: answers[name] for name in wanted}

    def train(self, mode: bool = True) -> MultiTaskModel:
        """Stays in evaluation mode: frozen batch norms and dropout are part of what is shared."""
        del mode
        return super().train(False)

    def plan(self, tasks: Sequence[str] | None = None) -> tuple[BlockSharing, ...]:
        """Who shares what, block by block, in order.

        Raises:
            InputError: an unknown task.
        """
        inputs: tuple[tuple[str, ...], ...] = (self._wanted(tasks),)
        found = []
        for block in self.blocks:
            together, alone = self._weights(block, inputs)
            weights = tuple(group for group in (together, *((name,) for name in alone)) if group)
            kind: Literal["shared", "stacked", "branched"] = "shared" if len(inputs) == 1 else "stacked"
            found.append(BlockSharing(block, weights, inputs, "branched" if len(weights) > 1 else kind))
            inputs = groups_after(inputs, alone)
        return tuple(found)

    def flops(self, x: Any, tasks: Sequence[str] | None = None) -> int:
        """FLOPs of one forward, counted while it runs; a multiply-add counts 2."""
        return int(count_flops(self, lambda: self(x, tasks))[""])

    def weight_bytes(self) -> int:
        """Bytes of all weights, shared ones counted once."""
        return parameter_bytes(self)

    def _wanted(self, tasks: Sequence[str] | None) -> tuple[str, ...]:
        if isinstance(tasks, str):
            raise InputError(f"tasks: got the text {tasks!r}, expected a list of names")
        wanted = self.tasks if tasks is None else tuple(dict.fromkeys(tasks))
        for name in wanted:
            if name not in self.tasks:
                raise unknown_name("task", name, self.tasks, "tasks")
        if not wanted:
            raise InputError("tasks: got none, expected at least one")
        return wanted

    def _weights(self, block: str, inputs: Sequence[tuple[str, ...]]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Tasks that use the backbone's weights in `block`, and those that have their own."""
        names = [name for group in inputs for name in group]
        return (
            tuple(name for name in names if (name, block) not in self._places),
            tuple(name for name in names if (name, block) in self._places),
        )


def _units(base: nn.Module) -> tuple[str, ...]:
    return tuple(name for stack in find_blocks(base) for name in stack.names)


def _all_units(base: nn.Module, blocks: Sequence[str] | None, tasks: Mapping[str, TaskBranch]) -> tuple[str, ...]:
    """Units in order of registration: those given or found, and those of tasks."""
    wanted = dict.fromkeys(path for task in tasks.values() for path in task.blocks)
    modules = list(dict(base.named_modules()))
    for path in wanted:
        if path not in modules:
            raise InputError(f"tasks: {path} is no block of {type(base).__name__}; tune blocks of the same backbone")
    units = check_block_paths(_units(base) if blocks is None else blocks, base)
    loose = [path for path in wanted if not inside_any(path, units)]
    if blocks is not None and loose:
        raise InputError(f"tasks: {loose[0]} is tuned by a task and in none of the blocks; add it to blocks=")
    found = [unit for unit in units if not inside_any(unit, loose)]
    return check_block_paths(sorted({*found, *loose}, key=modules.index) if loose else units, base)


def _load_(module: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Give `module`, which shares its tensors, tensors of its own."""
    expected = module.state_dict()
    odd = sorted({*expected} ^ {*state})
    if odd:
        raise InputError(f"{what}: the tensor {odd[0]} is not on both sides; give the state of the whole block")
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise InputError(f"{what}: {name} has shape {tuple(tensor.shape)}, expected {tuple(expected[name].shape)}")
    copies = {name: tensor.detach().clone().to(expected[name]) for name, tensor in state.items()}
    module.load_state_dict(copies, assign=True)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
