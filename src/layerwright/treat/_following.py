"""Who reads a layer's output, seen in one forward: no tracing of the model's code, only its calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

__all__ = ["Following", "follow"]

_LOOKS = {"__get__", "__len__", "__hash__", "dim", "size", "numel", "stride", "is_contiguous", "is_floating_point"}
"""Functions that look at a tensor without reading its values."""


@dataclass
class Following:
    """What became of a module's output.

    Attributes:
        calls: how often the module ran.
        readers: per read of an output, the name of the function and the path of the leaf module that called it ("" for
            code outside of leaf modules).
    """

    calls: int = 0
    readers: list[tuple[str, str]] = field(default_factory=list)

    @property
    def only_relu(self) -> bool:
        """Whether every output was read by a ReLU, once, and by nothing else."""
        return 0 < self.calls == len(self.readers) and all(name in ("relu", "relu_") for name, _ in self.readers)


@torch.no_grad()
def follow(model: nn.Module, watched: Mapping[str, nn.Module], run: Callable[[], object]) -> dict[str, Following]:
    """Watch the outputs of the modules `watched` (path to module) while `run()` carries out one forward of `model`.

    Memory: the watched outputs of that forward.
    """
    found = {path: Following() for path in watched}
    inside: list[str] = []
    outputs: dict[int, tuple[str, Tensor]] = {}
    kept: list[object] = []  # so that no new tensor gets an old one's id

    def enter(path: str) -> Callable[..., None]:
        return lambda *_: inside.append(path)

    def leave(*_: Any) -> None:
        inside.pop()

    def remember(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            found[path].calls += 1
            outputs[id(output)] = (path, output)

        return hook

    def read(name: str, values: Any) -> None:
        for leaf in tree_leaves(values):
            known = outputs.get(id(leaf))
            if known is not None and name not in _LOOKS:
                found[known[0]].readers.append((name, inside[-1] if inside else ""))

    class Reads(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = getattr(func, "__name__", str(func))
            read(name, (args, kwargs or {}))
            result = func(*args, **(kwargs or {}))
            if name.startswith("relu"):  # in place, it gives its input back as another value
                kept.append(outputs.pop(id(result), None))
            return result

    handles = []
    for path, module in model.named_modules():
        if next(module.children(), None) is None:
            handles.append(module.register_forward_pre_hook(enter(path)))
            handles.append(module.register_forward_hook(leave))
    handles += [module.register_forward_hook(remember(path)) for path, module in watched.items()]
    try:
        with Reads():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return found
