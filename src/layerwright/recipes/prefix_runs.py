"""Forwards of a chain of modules that differ in a few of them: what comes before the first difference is run once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Mapping
from typing import Any, TypeGuard

from torch import Tensor, nn

__all__ = ["PrefixRuns"]


class PrefixRuns:
    """Runs an ``nn.Sequential``, and keeps what entered each child that may change.

    Memory: at most `limit` bytes of activations; the ones used longest ago go first.

    Args:
        model: children one after the other, all of them in evaluation mode when it runs.
        paths: modules within `model` that may change from one run to the next.
        limit: bytes.
    """

    def __init__(self, model: nn.Sequential, paths: Iterable[str], limit: int = 256 << 20) -> None:
        self._children = list(model)
        names = [name for name, _ in model.named_children()]
        place = {name: number for number, name in enumerate(names)}
        own: dict[int, list[str]] = {}
        for path in paths:
            own.setdefault(place[path.split(".")[0]], []).append(path)
        self._cuts = sorted(own)
        self._paths = [own[cut] for cut in self._cuts]
        self._kept: OrderedDict[Hashable, Tensor] = OrderedDict()
        self._bytes, self._limit = 0, limit

    @staticmethod
    def suits(model: nn.Module) -> TypeGuard[nn.Sequential]:
        """Whether `model` runs its children one after the other, without hooks of its own."""
        hooked = model._forward_hooks or model._forward_pre_hooks
        return isinstance(model, nn.Sequential) and type(model).forward is nn.Sequential.forward and not hooked

    def run(self, inputs: Tensor, name: Hashable, states: Mapping[str, Hashable]) -> Any:
        """What the model gives for `inputs`.

        Args:
            inputs: of the first child.
            name: of these inputs: other inputs have another name.
            states: changeable path to what it is now; a path that is left out is as it was at first.
        """
        keys: list[Hashable] = []
        before: tuple[Hashable, ...] = (name,)
        for paths in self._paths:
            keys.append(before)
            before = (*before, tuple(states.get(path) for path in paths))
        value, start, next_cut = inputs, 0, 0
        for number in range(len(keys) - 1, -1, -1):
            if keys[number] in self._kept:
                self._kept.move_to_end(keys[number])
                # The child may write into it.
                value, start, next_cut = self._kept[keys[number]].clone(), self._cuts[number], number + 1
                break
        for child in range(start, len(self._children)):
            if next_cut < len(keys) and child == self._cuts[next_cut]:
                self._keep(keys[next_cut], value)
                next_cut += 1
            value = self._children[child](value)
        return value

    def _keep(self, key: Hashable, value: Any) -> None:
        if not isinstance(value, Tensor):
            return
        # What entered, not what an activation in place makes of it.
        self._kept[key] = value.clone()
        self._bytes += value.numel() * value.element_size()
        while self._bytes > self._limit and self._kept:
            _, old = self._kept.popitem(last=False)
            self._bytes -= old.numel() * old.element_size()
