"""Write down what a forward pass computes from its input, as a list of operations on tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from layerwright.nn.attention_products import watch_products

__all__ = ["Operation", "Record", "recording", "tensors_in"]


@dataclass(frozen=True)
class Operation:
    """One call of a torch function that reads what depends on the input.

    Attributes:
        name: of the function, without underscores and without the ``r`` and ``i`` of reflected and in-place operators.
        function, args, kwargs: the call.
        inputs: ``(number, tensor)`` of every argument that depends on the input.
        outputs: ``(number, tensor)`` of every result.
        module: path of the innermost module that was running.
        product: ``scores`` for query times key, ``values`` for probabilities times value, else empty.
    """

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: tuple[tuple[int, Tensor], ...]
    outputs: tuple[tuple[int, Tensor], ...]
    module: str
    product: str = ""


@dataclass
class Record:
    """All operations in order; values (tensors, as they were at some time) have numbers, the input's is 0."""

    operations: list[Operation] = field(default_factory=list)
    numbers: dict[int, int] = field(default_factory=dict)
    kept: list[Tensor] = field(default_factory=list)  # so that no identity is used twice

    def number(self, tensor: Tensor) -> int | None:
        """The number of what `tensor` holds now; None if it does not depend on the input."""
        return self.numbers.get(id(tensor))

    def add(self, tensor: Tensor) -> int:
        """Give what `tensor` holds now a number."""
        self.kept.append(tensor)
        self.numbers[id(tensor)] = len(self.kept) - 1
        return len(self.kept) - 1


@contextmanager
def recording(model: nn.Module, x: Tensor) -> Iterator[Record]:
    """Context: the operations that read `x`, or what was computed from it, while `model` runs inside.

    Fused attention is written out product by product. Memory: every value that is computed from `x`.
    """
    record = Record()
    record.add(x)
    mode = _Recorder(record)
    handles = []
    for path, module in model.named_modules():

        def enter(_module: nn.Module, _args: Any, path: str = path) -> None:
            mode.modules.append(path)

        def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
            mode.modules.pop()

        handles += [
            module.register_forward_pre_hook(enter, prepend=True),
            module.register_forward_hook(leave, always_call=True),
        ]
    try:
        # The inner mode takes fused attention apart, so that the outer one sees the products.
        with mode, watch_products(lambda _operand, value: value):
            yield record
    finally:
        for handle in handles:
            handle.remove()


class _Recorder(TorchFunctionMode):
    def __init__(self, record: Record) -> None:
        super().__init__()
        self.record = record
        self.modules: list[str] = []
        self._probabilities: set[int] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        record = self.record
        read = [(n, t) for t in tensors_in((args, kwargs)) if (n := record.number(t)) is not None]
        if not read:
            return func(*args, **kwargs)
        raw = getattr(func, "__name__", str(func))
        changing = (raw.endswith("_") and not raw.endswith("__")) or (raw.startswith("__i") and raw != "__invert__")
        if changing:  # what is overwritten is needed again
            copies = {id(t): t.detach().clone() for _, t in read}
            saved, saved_read = _replace(args, copies), tuple((n, copies[id(t)]) for n, t in read)
        else:
            saved, saved_read = args, tuple(read)
        output = func(*args, **kwargs)
        old = {id(t) for _, t in read}
        results = [t for t in tensors_in(output) if t.is_floating_point() and (changing or id(t) not in old)]
        if raw == "__setitem__":
            results = [args[0]]
        if results:
            name = _plain(raw)
            product = self._product(name, args, len(read))
            outputs = tuple((record.add(t), t) for t in results)
            if name == "softmax" or (name in _KEEPING and read[0][0] in self._probabilities):
                self._probabilities |= {n for n, _ in outputs}
            module = self.modules[-1] if self.modules else ""
            record.operations.append(Operation(name, func, saved, dict(kwargs), saved_read, outputs, module, product))
        return output

    def _product(self, name: str, args: tuple[Any, ...], computed: int) -> str:
        """Which product of attention a call is: the second one's left factor comes from a softmax."""
        if name not in ("matmul", "bmm") or computed < 2:
            return ""
        return "values" if self.record.number(args[0]) in self._probabilities else "scores"


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists and mappings."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from tensors_in(value)
    elif isinstance(tree, tuple | list):
        for value in tree:
            yield from tensors_in(value)


def _replace(tree: Any, new: dict[int, Tensor]) -> Any:
    """`tree` with tensors exchanged by identity."""
    if isinstance(tree, torch.Tensor):
        return new.get(id(tree), tree)
    if isinstance(tree, dict):
        return {key: _replace(value, new) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        return type(tree)(_replace(value, new) for value in tree)
    return tree


def _plain(raw: str) -> str:
    name = raw.strip("_")
    return _SAME.get(name, name)


_KEEPING = {"to", "type_as", "float", "double", "half", "bfloat16", "dropout", "contiguous", "clone", "view", "reshape"}
"""What may happen to probabilities before they meet the values."""

_SAME = {
    "radd": "add", "iadd": "add", "rsub": "sub", "isub": "sub", "rmul": "mul", "imul": "mul", "truediv": "div",
    "itruediv": "div", "true_divide": "div", "multiply": "mul", "subtract": "sub", "divide": "div", "imatmul": "matmul",
}  # fmt: skip
