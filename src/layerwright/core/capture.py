"""See what goes into layers and comes out, while the model runs as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from layerwright.core.layer import LayerRef, get_parameter

__all__ = ["eager_experts", "first_tensor", "watch_inputs", "watch_outputs"]

SeeInput = Callable[[LayerRef, Tensor, int | None], None]
"""``see(layer, x, expert)``: `x` is ``(..., in)`` (or a convolution's input); `expert` is None unless it is one of many."""


@contextmanager
def watch_inputs(model: nn.Module, refs: Sequence[LayerRef], see: SeeInput) -> Iterator[None]:
    """Context: `see` is called with the input of each of `refs`, each time it runs.

    Experts that are stored as one parameter have no module of their own; their inputs are seen where the model
    multiplies with a slice of that parameter.
    """
    plain = [ref for ref in refs if ref.layout not in ("experts", "experts_transposed")]
    experts = [ref for ref in refs if ref.layout in ("experts", "experts_transposed")]
    handles = []
    for ref in plain:

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], ref: LayerRef = ref) -> None:
            value = args[0] if args else next(iter(kwargs.values()))
            see(ref, value, None)

        handles.append(model.get_submodule(ref.path).register_forward_pre_hook(hook, with_kwargs=True))
    try:
        if experts:
            with eager_experts(model), _ExpertWatcher(model, experts, see):
                yield
        else:
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watch_outputs(model: nn.Module, paths: Sequence[str], see: Callable[[str, Any, Any], None]) -> Iterator[None]:
    """Context: ``see(path, args, output)`` after each run of the modules called `paths`."""
    handles = []
    for path in paths:

        def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any, path: str = path) -> None:
            see(path, args or tuple(kwargs.values()), output)

        handles.append(model.get_submodule(path).register_forward_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def first_tensor(value: Any) -> Tensor:
    """The tensor itself, or the first tensor of a tuple, list, mapping or model output.

    Raises:
        TypeError: there is none.
    """
    if isinstance(value, Tensor):
        return value
    values = value.values() if hasattr(value, "values") else value if isinstance(value, tuple | list) else ()
    for item in values:
        if isinstance(item, Tensor):
            return item
    raise TypeError(f"expected a tensor or a tuple that holds one, got {type(value).__name__}")


@contextmanager
def eager_experts(model: nn.Module) -> Iterator[None]:
    """Context: models with a choice of experts implementation use the plain one, expert by expert."""
    configs = {
        id(config): config
        for module in model.modules()
        if (config := getattr(module, "config", None)) is not None and hasattr(config, "_experts_implementation")
    }
    before = {key: config._experts_implementation for key, config in configs.items()}
    for config in configs.values():
        config._experts_implementation = "eager"
    try:
        yield
    finally:
        for key, config in configs.items():
            config._experts_implementation = before[key]


class _ExpertWatcher(TorchFunctionMode):
    """Sees matrix products whose weight is one slice of an experts parameter."""

    def __init__(self, model: nn.Module, refs: Sequence[LayerRef], see: SeeInput) -> None:
        super().__init__()
        self.see = see
        self.known: list[tuple[int, int, int, LayerRef]] = []
        for ref in refs:
            parameter = get_parameter(model, ref.parameter)
            step = parameter.stride(0) * parameter.element_size()
            start = parameter.data_ptr()
            self.known.append((start, start + step * parameter.shape[0], step, ref))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS and len(args) >= 2 and isinstance(args[1], Tensor) and isinstance(args[0], Tensor):
            self._look(args[0], args[1])
        return func(*args, **kwargs)

    def _look(self, x: Tensor, weight: Tensor) -> None:
        if weight.dim() != 2 or x.dim() < 1 or weight.device.type == "meta":
            return
        pointer = weight.data_ptr()
        for start, end, step, ref in self.known:
            if start <= pointer < end:
                self.see(ref, x, (pointer - start) // step)
                return


_PRODUCTS = {nn.functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm}
