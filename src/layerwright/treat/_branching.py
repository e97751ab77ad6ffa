"""Forwards that branch: a batch that holds the activations of several tasks, one group behind the other."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from layerwright.core.errors import InputError

__all__ = ["BranchState", "Branching", "Readouts", "groups_after", "intercept_"]

Group = tuple[str, ...]
"""Tasks whose activations are still the same."""


@dataclass
class BranchState:
    """Of the forward that runs.

    Attributes:
        groups: tasks of equal activations; the groups lie one behind the other in the batch.
        rows: samples of each group; 0 when no forward of several tasks runs.
        stacked: tensors with a row for each sample of each group, beside hidden states, that the last block gave.
        answers: logits by task.
        returned: what the readout gave back to the backbone.
    """

    groups: tuple[Group, ...] = ()
    rows: int = 0
    stacked: list[Tensor] = field(default_factory=list)
    answers: dict[str, Tensor] = field(default_factory=dict)
    returned: Tensor | None = None

    @contextmanager
    def running(self, tasks: Group, rows: int) -> Iterator[None]:
        """Context: one forward of `tasks` on `rows` samples."""
        self._reset((tasks,), rows)
        try:
            yield
        finally:
            self._reset((), 0)

    def _reset(self, groups: tuple[Group, ...], rows: int) -> None:
        self.groups, self.rows, self.stacked, self.answers, self.returned = groups, rows, [], {}, None


class Branching:
    """Stands in for a block's forward: runs it once with the backbone's weights, and once for each task with its own.

    Args:
        state: of the forward.
        inner: the block's own forward.
        own: modules of the tasks that have their own.
    """

    def __init__(self, state: BranchState, inner: Callable[..., Any], own: Mapping[str, nn.Module]) -> None:
        self.state, self.inner, self.own = state, inner, dict(own)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        state, before = self.state, self.state.groups
        if not before:
            return self.inner(*args, **kwargs)
        plain = not kwargs and len(args) == 1 and isinstance(args[0], Tensor)
        if (plain or len(before) == 1) and not any(name in self.own for group in before for name in group):
            output = self.inner(*args, **kwargs)  # nothing branches here, and nothing has to be stacked
            return output if isinstance(output, Tensor) or len(before) == 1 else self._given(output, before)
        after = groups_after(before, self.own)
        together = tuple(group for group in after if group[0] not in self.own)
        calls = [(together, self.inner)] if together else []
        calls += [((group,), self.own[group[0]]) for group in after if group[0] in self.own]
        outputs: dict[Group, Any] = {}
        for groups, call in calls:
            places = [next(i for i, old in enumerate(before) if group[0] in old) for group in groups]
            own_args, own_kwargs = self._rows((args, kwargs), places)
            output = call(*own_args, **own_kwargs)
            if groups == after:  # nothing to put together
                return self._given(output, after)
            outputs |= _split(output, groups, state.rows)
        return self._given(_stack([outputs[group] for group in after], state.rows), after)

    def _given(self, output: Any, groups: tuple[Group, ...]) -> Any:
        rows = self.state.rows * len(groups)
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.dim()]
        self.state.groups, self.state.stacked = groups, [tensor for tensor in tensors if len(tensor) == rows]
        return output

    def _rows(self, given: Any, places: Sequence[int]) -> Any:
        """The arguments for the groups at `places`: hidden states come first, and what blocks gave is stacked too."""
        leaves, spec = tree_flatten(given)
        count, rows = len(self.state.groups), self.state.rows
        first = next((leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()), None)

        def pick(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.dim() == 0:
                return value
            stacked = value is first or any(value is known for known in self.state.stacked)
            if stacked and len(value) == rows * count:
                if list(places) == list(range(count)):
                    return value
                parts = value.split(rows)  # type: ignore[no-untyped-call]
                return torch.cat([parts[place] for place in places]) if len(places) > 1 else parts[places[0]]
            if len(value) == rows > 1 and len(places) > 1:  # the same for all tasks: a mask made from the input
                return torch.cat([value] * len(places))
            return value

        return tree_unflatten([pick(leaf) for leaf in leaves], spec)


class Readouts:
    """Stands in for the readout's forward: gives each task its own.

    Args:
        state: of the forward.
        path: of the readout, for messages.
        heads: what computes the logits of each task.
    """

    def __init__(self, state: BranchState, path: str, heads: Mapping[str, Callable[..., Any]]) -> None:
        self.state, self.path, self.heads = state, path, dict(heads)

    def __call__(self, features: Tensor) -> Tensor:
        state = self.state
        if not state.groups:
            return next(iter(self.heads.values()))(features)  # type: ignore[no-any-return]
        if len(features) != state.rows * len(state.groups):
            raise InputError(
                f"tasks: the readout {self.path} gets {len(features)} rows, expected {state.rows} for each of "
                f"{len(state.groups)} groups of tasks: the backbone mixes samples behind its blocks"
            )
        parts = features.split(state.rows)  # type: ignore[no-untyped-call]
        for group, part in zip(state.groups, parts, strict=True):
            state.answers |= {name: self.heads[name](part) for name in group}
        state.returned = state.answers[state.groups[0][0]]
        return state.returned


def intercept_(module: nn.Module, stand_in: Callable[..., Any]) -> None:
    """Let `module` run `stand_in` instead of its forward."""
    module.forward = stand_in  # type: ignore[method-assign]


def groups_after(groups: Sequence[Group], alone: Container[str]) -> tuple[Group, ...]:
    """Groups of equal activations behind a block in which the tasks of `alone` have weights of their own."""
    split: list[Group] = []
    for group in groups:
        rest = tuple(name for name in group if name not in alone)
        split += [rest] if rest else []
        split += [(name,) for name in group if name in alone]
    return tuple(split)


def _split(output: Any, groups: Sequence[Group], rows: int) -> dict[Group, Any]:
    """The output of a call on several groups, for each of them."""
    if len(groups) == 1:
        return {groups[0]: output}
    leaves, spec = tree_flatten(output)
    parts: list[Sequence[Any]] = [
        leaf.split(rows)
        if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == rows * len(groups)
        else [leaf] * len(groups)
        for leaf in leaves
    ]
    return {group: tree_unflatten([part[i] for part in parts], spec) for i, group in enumerate(groups)}


def _stack(outputs: Sequence[Any], rows: int) -> Any:
    """The outputs of all groups, one behind the other on the batch axis."""
    if len(outputs) == 1:
        return outputs[0]
    flat = [tree_flatten(output) for output in outputs]
    leaves = [
        torch.cat(list(column))
        if isinstance(column[0], Tensor) and column[0].dim() and len(column[0]) == rows
        else column[0]
        for column in zip(*(leaves for leaves, _ in flat), strict=True)
    ]
    return tree_unflatten(leaves, flat[0][1])
