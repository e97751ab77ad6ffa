"""Move a factor and a shift of each channel from a norm's output into the layers that read it.

``y = x @ W.T + c`` with ``x`` the norm's output is ``((x - b) / s) @ (W * s).T + (c + W @ b)``: the division and the
shift go into the norm's own weight and bias, so that the model computes the same with other ranges in between (Xiao et
al., 2023, SmoothQuant; with the shift: Wei et al., 2023; Tai and Wu, 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from layerwright.core.calibration import Calibration, evaluating
from layerwright.core.errors import InputError
from layerwright.core.layer import get_parameter
from layerwright.treat.activations import Samples

__all__ = ["NormReaders", "find_norm_readers", "migrate_", "norm_offset", "sample_norms"]


@dataclass(frozen=True)
class NormReaders:
    """A norm and every layer that reads its output.

    Attributes:
        norm: path.
        readers: paths of linear layers, in the order in which they run.
        channels: size of the output's last dimension.
        others: what else reads the output (a residual sum, a router, the model's own output); a factor moved away from
            such a norm would change the model, so that `migrate_` refuses it.
        shift: whether a shift may be moved too: not across padding with zeros, and not out of a norm without bias.
    """

    norm: str
    readers: tuple[str, ...]
    channels: int
    others: tuple[str, ...] = ()
    shift: bool = True


def find_norm_readers(model: nn.Module, calibration: Calibration) -> tuple[NormReaders, ...]:
    """Norms whose output goes into linear layers, found by following one batch through the model.

    A norm is a module whose class name holds ``Norm`` and that keeps the shape of its input. Its output is followed
    through what only rearranges it (views, permutations, selections, padding); everything else that reads it is noted.
    """
    norms = {path: module for path, module in model.named_modules() if _is_norm(module)}
    weights = {
        id(module.weight): path
        for path, module in model.named_modules()
        if isinstance(getattr(module, "weight", None), nn.Parameter) and _is_linear(module)
    }
    follow = _Follow(weights)
    handles = []
    for path, module in norms.items():

        def hook(_module: nn.Module, args: Any, output: Any, path: str = path) -> None:
            if isinstance(output, Tensor) and args and isinstance(args[0], Tensor) and output.shape == args[0].shape:
                follow.start(path, output)

        handles.append(module.register_forward_hook(hook))
    batch = next(iter(calibration), None)
    if batch is None:
        raise InputError("calibration: it is empty; norms cannot be followed")
    try:
        with torch.no_grad(), evaluating(model), follow:
            output = calibration.forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    follow.finish(output)
    found = []
    for path, trace in follow.traces.items():
        readers = tuple(dict.fromkeys(trace.readers))
        if readers:
            shift = not trace.padded and _takes_shift(norms[path])
            others = tuple(dict.fromkeys(trace.others))
            found.append(NormReaders(path, readers, trace.channels, others, shift))
    return tuple(found)


def sample_norms(
    model: nn.Module, calibration: Calibration, groups: tuple[NormReaders, ...], *, seed: int = 0
) -> dict[str, Samples]:
    """Samples of each norm's output, by path of the norm; one pass over the calibration."""
    found = {group.norm: Samples(seed=seed) for group in groups}
    handles = [
        model.get_submodule(path).register_forward_hook(lambda _m, _a, output, s=samples: s.update(output))
        for path, samples in found.items()
    ]
    try:
        with torch.no_grad(), evaluating(model):
            for batch in calibration:
                calibration.forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return found


@torch.no_grad()
def migrate_(model: nn.Module, group: NormReaders, scale: Tensor, shift: Tensor | None = None) -> None:
    """Divide the norm's output by `scale` after taking `shift` from it, and undo both in its readers.

    Parameters are replaced, not written to. A norm without weight or bias, and a reader without bias, gets one where
    it is needed. Arithmetic is float64; results are rounded once to each parameter's dtype.

    Args:
        model: changed in place.
        group: from `find_norm_readers`.
        scale: ``(channels,)``, positive.
        shift: ``(channels,)``; None moves none.

    Raises:
        InputError: something else reads the norm's output, a shift that cannot be moved, a scale that is not positive.
    """
    if group.others:
        raise InputError(f"{group.norm}: its output is also read by {', '.join(group.others[:3])}; leave this norm out")
    if scale.shape != (group.channels,) or not bool((scale.isfinite() & (scale > 0)).all()):
        raise InputError(f"{group.norm}: scale: expected {group.channels} positive numbers, got {tuple(scale.shape)}")
    if shift is not None and not group.shift:
        raise InputError(f"{group.norm}: it has no bias to shift, or zeros are padded to its output; use shift: false")
    norm: Any = model.get_submodule(group.norm)
    factor = scale.double()
    offset = norm_offset(norm)
    old = getattr(norm, "weight", None)
    first: Tensor = get_parameter(model, f"{group.readers[0]}.weight")
    weight = torch.ones_like(factor) if old is None else old.double() + offset
    _set(norm, "weight", weight / factor - offset, first if old is None else old)
    if shift is not None or isinstance(getattr(norm, "bias", None), Tensor):
        bias = getattr(norm, "bias", None)
        value = torch.zeros_like(factor) if bias is None else bias.double()
        value = value if shift is None else value - shift.double()
        _set(norm, "bias", value / factor, first if bias is None else bias)
    for path in group.readers:
        reader: Any = model.get_submodule(path)
        columns = reader.weight.double()
        columns = columns if isinstance(reader, nn.Linear) else columns.T
        if shift is not None:
            bias = reader.bias
            value = columns @ shift.double() if bias is None else bias.double() + columns @ shift.double()
            _set(reader, "bias", value, reader.weight if bias is None else bias)
        columns = columns * factor
        _set(reader, "weight", columns if isinstance(reader, nn.Linear) else columns.T, reader.weight)


@torch.no_grad()
def norm_offset(norm: nn.Module) -> float:
    """1 for norms that multiply by ``1 + weight`` (Gemma), 0 for those that multiply by `weight`."""
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, Tensor) or isinstance(norm, nn.LayerNorm):
        return 0.0
    x = torch.linspace(-1, 1, weight.numel(), device=weight.device).reshape(1, 1, -1)
    kept = norm._parameters["weight"]
    try:
        norm._parameters["weight"] = nn.Parameter(torch.zeros_like(weight), requires_grad=False)
        silent = bool((norm(x.to(weight.dtype)).float() == 0).all())
    finally:
        norm._parameters["weight"] = kept
    return 0.0 if silent else 1.0


def _set(module: nn.Module, name: str, value: Tensor, like: Tensor) -> None:
    parameter = nn.Parameter(value.to(like.dtype).contiguous(), requires_grad=like.requires_grad)
    module._parameters[name] = parameter
    module.__dict__.pop(name, None)


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and not any(True for _ in module.children())


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _takes_shift(norm: nn.Module) -> bool:
    """LayerNorm takes a bias whether it has one or not; a root-mean-square norm computes none."""
    return isinstance(norm, nn.LayerNorm)


@dataclass
class _Trace:
    channels: int
    readers: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    padded: bool = False


class _Follow(TorchFunctionMode):
    """Follows tensors through what rearranges them."""

    def __init__(self, weights: dict[int, str]) -> None:
        super().__init__()
        self.weights = weights
        self.traces: dict[str, _Trace] = {}
        self._of: dict[int, str] = {}
        self._kept: list[Tensor] = []
        self._pause = 0

    def start(self, path: str, output: Tensor) -> None:
        """`output` is what the norm at `path` gave."""
        self.traces.setdefault(path, _Trace(output.shape[-1]))
        self._remember(output, path)

    def finish(self, output: Any) -> None:
        """The model's own output counts as a reader of its own."""
        for tensor in _tensors(output):
            if id(tensor) in self._of:
                self.traces[self._of[id(tensor)]].others.append("the model's output")
        self._of.clear()
        self._kept.clear()

    def _remember(self, tensor: Tensor, path: str) -> None:
        self._of[id(tensor)] = path
        self._kept.append(tensor)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        read = [(t, self._of[id(t)]) for t in _tensors((args, kwargs)) if id(t) in self._of]
        if not read or _name(func) in _ASKING:
            return output
        for tensor, path in read:
            trace = self.traces[path]
            reader = self._reader(func, args)
            if reader and args and _same(args[_INPUT.get(_name(func), 0)], tensor):
                trace.readers.append(reader)
            elif _name(func) in _REARRANGING and all(t.shape[-1:] == tensor.shape[-1:] for t in _tensors(output)):
                trace.padded |= _name(func) == "pad"
                for t in _tensors(output):
                    self._remember(t, path)
            else:
                trace.others.append(_name(func))
        return output

    def _reader(self, func: Any, args: tuple[Any, ...]) -> str:
        if func is F.linear and len(args) >= 2:
            return self.weights.get(id(args[1]), "")
        if func is torch.addmm and len(args) >= 3:
            return self.weights.get(id(args[2]), "")
        return ""


_INPUT = {"addmm": 1}
_REARRANGING = {
    "view", "reshape", "permute", "transpose", "contiguous", "roll", "__getitem__", "flatten", "unflatten", "clone",
    "unsqueeze", "squeeze", "expand", "pad", "dropout", "detach", "to", "chunk", "split", "select", "index_select",
    "movedim", "type_as", "float",
}  # fmt: skip
_ASKING = {"__get__", "size", "dim", "stride", "numel", "is_floating_point", "__len__", "data_ptr", "element_size"}


def _name(func: Callable[..., Any]) -> str:
    return getattr(func, "__name__", "").strip()


def _same(left: Any, right: Tensor) -> bool:
    return left is right


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict) or hasattr(tree, "values"):
        for value in tree.values():
            yield from _tensors(value)
    elif isinstance(tree, tuple | list):
        for value in tree:
            yield from _tensors(value)


@contextmanager
def unchanged(model: nn.Module, calibration: Calibration, tolerance: float = 1e-3) -> Iterator[None]:
    """Context: what happens inside must not change what `model` computes on the first calibration batch.

    Weights that change place are rounded anew, so that in bfloat16 and float16 four roundings are allowed where they are
    more than `tolerance`.

    Raises:
        InputError: the output moved by more than `tolerance` of its size.
    """
    batch = next(iter(calibration))
    dtypes = [p.dtype for p in model.parameters() if p.is_floating_point()]
    tolerance = max([tolerance, *(4 * torch.finfo(dtype).eps for dtype in dtypes)])
    with torch.no_grad(), evaluating(model):
        before = _first(calibration.forward(model, batch)).double()
        yield
        after = _first(calibration.forward(model, batch)).double()
    off = float((after - before).norm() / before.norm().clamp(min=1e-30))
    if not off <= tolerance:
        raise InputError(f"prepare: the step changed the model's output by {off:.1e} of its size; leave it out")


def _first(output: Any) -> Tensor:
    logits = getattr(output, "logits", None)
    return logits if isinstance(logits, Tensor) else next(_tensors(output))
