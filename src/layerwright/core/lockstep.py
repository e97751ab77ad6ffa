"""Run many forward passes in lockstep, suspended together at each block.

Every calibration batch's forward pass is a coroutine (a greenlet) that pauses when it reaches a chosen module. The
driver sees all batches standing before the same block, may look at its inputs, change it, and then lets every pass go
on through the changed block to the next one. The model's own code does the walking, so that masks, position
embeddings, several stacks, stages and cross-attention need no special knowledge; the work is one forward in all, plus
whatever the driver runs itself; the memory is one set of activations.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn

from layerwright.core.products import fast_products

__all__ = ["Call", "Lockstep", "LockstepState", "NotResumableError", "Stop"]


@dataclass
class Call:
    """One suspended call of a module: its arguments as the model gave them."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class Stop:
    """All passes that stand before `path`.

    Attributes:
        path: the module that is about to run.
        calls: the arguments, one entry per pass.
        visit: 0 the first time; a module that a pass calls again (shared weights) stops again with 1, 2, ...
        run: run the module as it is now, with its hooks, on one call without letting the pass go on; returns its
            output.
    """

    path: str
    calls: list[Call]
    visit: int
    run: Callable[[Call], Any] = field(repr=False)


class NotResumableError(Exception):
    """The values that flow between the blocks cannot be written to a file."""


@dataclass
class LockstepState:
    """A lockstep's position as data: `tensors` go to a safetensors file, `passes` to JSON.

    Per pass: the outputs of the modules it has run (their shapes, and the values of those still in use), the module it
    stands before, and the values it stands there with.
    """

    passes: list[dict[str, Any]]
    tensors: dict[str, Tensor]


@dataclass
class _Pass:
    coroutine: Any
    index: int
    path: str = ""
    call: Call | None = None
    history: list[tuple[str, Any]] = field(default_factory=list)
    first_leaves: list[weakref.ref[Tensor]] = field(default_factory=list)
    replay: list[dict[str, Any]] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)
    gradients: bool = field(default_factory=torch.is_grad_enabled)


class Lockstep:
    """Drive `forwards` through the modules called `units`, together.

    Args:
        model: the model that every forward runs.
        units: module paths, none inside another.
        forwards: functions without arguments; each runs the model on one batch. Run them without gradients.
        keep_history: remember outputs as weak references, so that `state` can be taken.
        resume: a state taken earlier with the same model, units and forwards: the passes come back to where they stood
            without running the modules that were done, with the very values they had.

    Iterate to get a `Stop` per unit. When the loop body ends, the passes run the module (as it is then) and go on.
    Passes end as soon as every unit was visited. Leaving the loop early cancels them.
    """

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[str],
        forwards: Sequence[Callable[[], object]],
        *,
        keep_history: bool = False,
        resume: LockstepState | None = None,
    ) -> None:
        self.model = model
        self.units = tuple(units)
        self.forwards = tuple(forwards)
        self.keep_history = keep_history
        self.resume = resume
        self._passes: list[_Pass] = []
        self._originals: dict[str, tuple[nn.Module, Callable[..., Any]]] = {}
        self._current: Stop | None = None

    def __iter__(self) -> Iterator[Stop]:
        visits: dict[str, int] = {}
        try:
            self._patch()
            self._start()
            if self.resume is not None:
                for record in self.resume.passes[0]["history"] if self.resume.passes else ():
                    visits[record["path"]] = visits.get(record["path"], 0) + 1
            while True:
                waiting = [p for p in self._passes if p.call is not None]
                if not waiting:
                    return
                path = waiting[0].path
                group = [p for p in waiting if p.path == path]
                calls = [p.call for p in group if p.call is not None]
                self._current = Stop(path, calls, visits.get(path, 0), partial(self._call, path))
                yield self._current
                visits[path] = visits.get(path, 0) + 1
                self._current = None
                calls.clear()
                if len(visits) == len(self.units):
                    return
                self._advance(path, group)
        finally:
            self._cancel()

    def state(self) -> LockstepState:
        """The position at the current stop, to be taken before anything else runs.

        Raises:
            NotResumableError: the values between blocks are of a type that has no file form.
        """
        tensors: dict[str, Tensor] = {}
        passes = []
        for item in self._passes:
            assert item.call is not None
            standing: dict[int, str] = {}
            fixed = {id(t) for t in (ref() for ref in item.first_leaves) if t is not None}
            leaves = _leaves((item.call.args, item.call.kwargs))
            for number, leaf in enumerate(leaves):
                if id(leaf) not in fixed and id(leaf) not in standing:
                    key = f"pass{item.index}.leaf{number}"
                    standing[id(leaf)] = key
                    tensors[key] = leaf.detach().contiguous()
            values = [standing.get(id(leaf)) for leaf in leaves]
            history = []
            for number, (path, output) in enumerate(item.history):
                kept = _describe(output, standing, tensors, f"pass{item.index}.output{number}")
                history.append({"path": path, "output": kept})
            passes.append({"path": item.path, "leaves": values, "history": history})
        return LockstepState(passes, tensors)

    # -- the passes ---------------------------------------------------------------------------------------------

    def _start(self) -> None:
        for index, forward in enumerate(self.forwards):
            item = _Pass(None, index)
            if self.resume is not None:
                item.replay = list(self.resume.passes[index]["history"])
            item.coroutine = greenlet(lambda forward=forward: _quietly(forward))
            item.coroutine.lockstep = self
            self._passes.append(item)
            self._take(item, _within(item, item.coroutine.switch))
            while item.replay and item.call is not None:
                record = item.replay.pop(0)
                assert self.resume is not None
                output = _revive(record["output"], self.resume.tensors)
                item.history.append((record["path"], _weaken(output)))
                self._go_on(item, output)
            if self.resume is not None and item.call is not None:
                _restore(item.call, self.resume.passes[index]["leaves"], self.resume.tensors)

    def _advance(self, path: str, group: list[_Pass]) -> None:
        for item in group:
            assert item.call is not None
            output = _within(item, self._run, path, item.call)
            if self.keep_history:
                item.history.append((path, _weaken(output)))
            item.call = None
            self._go_on(item, output)

    def _go_on(self, item: _Pass, output: Any) -> None:
        item.call = None
        self._take(item, _within(item, item.coroutine.switch, output))
        if self.keep_history and item.call is not None:
            # What the model transforms before it passes it on may be in use later in a form that cannot be traced
            # (an encoder's normalised output): keep such outputs, to be computed again from.
            passed = {id(leaf) for leaf in _leaves((item.call.args, item.call.kwargs))}
            leaves = _leaves(output)
            if not all(id(leaf) in passed for leaf in leaves):
                item.kept.extend(leaves)

    def _take(self, item: _Pass, arrived: Any) -> None:
        if item.coroutine.dead:
            return
        item.path, args, kwargs = arrived
        item.call = Call(args, kwargs)
        if self.keep_history and not item.first_leaves:
            item.first_leaves = [weakref.ref(leaf) for leaf in _leaves((args, kwargs))]

    def _call(self, path: str, call: Call) -> Any:
        """The driver's own run: with the module's hooks, those that the driver has put there since included."""
        with fast_products():
            return self.model.get_submodule(path)(*call.args, **call.kwargs)

    def _run(self, path: str, call: Call) -> Any:
        """A pass's run: the module's call has come through its hooks already."""
        module = self.model.get_submodule(path)
        old, forward = self._originals[path]
        with fast_products():
            return forward(*call.args, **call.kwargs) if module is old else module(*call.args, **call.kwargs)

    # -- patching -----------------------------------------------------------------------------------------------

    def _patch(self) -> None:
        for path in self.units:
            module = self.model.get_submodule(path)
            self._originals[path] = (module, module.forward)

            def suspended(*args: Any, _path: str = path, **kwargs: Any) -> Any:
                current = getcurrent()
                if getattr(current, "lockstep", None) is not self:
                    return self._originals[_path][1](*args, **kwargs)
                return current.parent.switch((_path, args, kwargs))

            module.forward = suspended  # type: ignore[method-assign]

    def _cancel(self) -> None:
        for module, _ in self._originals.values():
            module.__dict__.pop("forward", None)
        for path, (module, forward) in self._originals.items():
            if getattr(forward, "__func__", None) is not type(module).forward:
                module.forward = forward  # type: ignore[method-assign]
            del path
        self._originals.clear()
        for item in self._passes:
            item.call = None
            if item.coroutine is not None and not item.coroutine.dead:
                _within(item, item.coroutine.throw, GreenletExit)
        self._passes.clear()


def _quietly(forward: Callable[[], object]) -> None:
    forward()


def _within(item: _Pass, resume: Callable[..., Any], *arguments: Any) -> Any:
    """Resume a pass with its own gradient mode, and come back with the driver's.

    Whether gradients are recorded is a state of the thread, and all passes share it: a forward that switches them off
    around its blocks would otherwise leave that state to whoever runs next.
    """
    own = torch.is_grad_enabled()
    torch.set_grad_enabled(item.gradients)
    try:
        return resume(*arguments)
    finally:
        item.gradients = torch.is_grad_enabled()
        torch.set_grad_enabled(own)


def _leaves(tree: Any) -> list[Tensor]:
    """The tensors of nested tuples, lists and dicts, in order."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, Mapping):
        return [leaf for value in tree.values() for leaf in _leaves(value)]
    if isinstance(tree, tuple | list):
        return [leaf for value in tree for leaf in _leaves(value)]
    return []


def _map(tree: Any, change: Callable[[Tensor], Any]) -> Any:
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, Mapping):
        return {key: _map(value, change) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        return type(tree)(_map(value, change) for value in tree) if type(tree) in (tuple, list) else tree
    return tree


@dataclass
class _Ghost:
    """An output that may have been freed: its shape and dtype, and the tensor while somebody still holds it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    alive: weakref.ref[Tensor]


def _weaken(output: Any) -> Any:
    return _map(output, lambda t: _Ghost(tuple(t.shape), t.dtype, weakref.ref(t)))


def _describe(output: Any, standing: dict[int, str], tensors: dict[str, Tensor], name: str) -> Any:
    if isinstance(output, _Ghost):
        tensor = output.alive()
        key = None
        if tensor is not None:
            key = standing.setdefault(id(tensor), name)
            tensors.setdefault(key, tensor.detach().contiguous())
        return {"tensor": list(output.shape), "dtype": str(output.dtype).removeprefix("torch."), "value": key}
    if output is None or isinstance(output, bool | int | float | str):
        return {"constant": output}
    if type(output) in (tuple, list):
        items = [_describe(item, standing, tensors, f"{name}.{i}") for i, item in enumerate(output)]
        return {"tuple" if type(output) is tuple else "list": items}
    if type(output) is dict:
        return {"dict": {key: _describe(item, standing, tensors, f"{name}.{key}") for key, item in output.items()}}
    raise NotResumableError(f"a block returns a {type(output).__name__}")


def _revive(data: dict[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    if "tensor" in data:
        if data["value"] is not None:
            return tensors[data["value"]]
        return torch.zeros(data["tensor"], dtype=getattr(torch, data["dtype"]))
    if "constant" in data:
        return data["constant"]
    if "dict" in data:
        return {key: _revive(item, tensors) for key, item in data["dict"].items()}
    listed: list[dict[str, Any]] = data["tuple"] if "tuple" in data else data["list"]
    items = [_revive(item, tensors) for item in listed]
    return tuple(items) if "tuple" in data else items


def _restore(call: Call, keys: list[str | None], tensors: Mapping[str, Tensor]) -> None:
    values = iter(keys)

    def change(leaf: Tensor) -> Tensor:
        key = next(values)
        return leaf if key is None else tensors[key]

    call.args = _map(call.args, change)
    call.kwargs = _map(call.kwargs, change)
