"""Who reads the outputs of a layer: followed through norms, activations, pools, flattening and concatenation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import fx, nn

from layerwright.core.errors import InputError

__all__ = ["Reach", "Reader", "check_growable", "find_reach", "traced"]

Form = Literal["map", "flat", "last"]
"""Feature maps ``(batch, channels, height, width)``, those flattened, or ``(..., features)`` of a linear layer."""

_POINTWISE = {
    *("relu", "relu_", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "sigmoid", "tanh"),
    *("hardtanh", "hardswish", "hardsigmoid", "softplus", "dropout", "dropout2d", "feature_dropout", "contiguous"),
    *("clone", "detach", "float", "double", "half", "to", "type", "abs", "neg", "exp"),
}
_POOLS = {"max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d"}
_ARITHMETIC = {"add", "iadd", "add_", "sub", "mul", "imul", "mul_", "truediv", "div", "maximum", "minimum"}
_SHAPES = {"size", "dim", "getattr", "numel", "ndimension"}
_POINTWISE_MODULES = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh),
    *(nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Softplus, nn.Identity, nn.Dropout, nn.Dropout2d),
)
_POOL_MODULES = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)


@dataclass(frozen=True)
class Reader:
    """A layer that takes the outputs in.

    Attributes:
        path: of the layer.
        offsets: channels in front of them in its input; several if they occur more than once.
        positions: values of each channel in a flattened input.
    """

    path: str
    offsets: tuple[int, ...] = (0,)
    positions: int = 1


@dataclass(frozen=True)
class Reach:
    """What must follow when a layer gets wider.

    Attributes:
        consumers: layers whose weights are divided.
        norms: BatchNorms, and activations with a value per channel, whose tensors are gathered.
    """

    consumers: tuple[Reader, ...]
    norms: tuple[Reader, ...] = ()


@dataclass(frozen=True)
class _Spread:
    """Where the outputs lie in the channels of a value."""

    offsets: tuple[int, ...]
    total: int
    form: Form


@dataclass
class _Walk:
    modules: Mapping[str, nn.Module]
    layer: str
    spread: dict[fx.Node, _Spread] = field(default_factory=dict)
    consumers: list[Reader] = field(default_factory=list)
    norms: list[Reader] = field(default_factory=list)


def traced(model: nn.Module, layer: str) -> fx.Graph:
    """The graph of `model`.

    Raises:
        InputError: its code depends on values.
    """
    try:
        return fx.Tracer().trace(model)
    except Exception as error:  # whatever the model's own code raises on symbols
        reason = " ".join(str(error).split())[:120]
        raise InputError(
            f"{type(model).__name__} cannot be traced from {layer} on ({reason}): name the layers that read it "
            "(consumers), or use widen_mlp for the feed-forward part of a transformer"
        ) from error


def check_growable(model: nn.Module, layer: str) -> nn.Conv2d | nn.Linear:
    """The module at `layer`.

    Raises:
        InputError: there is none, it is no plain linear layer or convolution, or its channels are in groups.
    """
    try:
        module = model.get_submodule(layer)
    except AttributeError as error:
        raise InputError(f"layer: there is no {layer!r} in {type(model).__name__}") from error
    if not isinstance(module, nn.Conv2d | nn.Linear):
        raise InputError(f"layer: {layer!r} is a {type(module).__name__}, expected Conv2d or Linear")
    _refuse_groups(module, layer)
    return module


def _refuse_groups(module: nn.Module, path: str) -> None:
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        raise InputError(f"{path} has {module.groups} groups: outputs and inputs of grouped convolutions grow together")


def find_reach(model: nn.Module, layer: str) -> Reach:
    """The layers and norms that the outputs of `layer` reach, by tracing the model (``torch.fx``).

    Raises:
        InputError: the layer is unknown, grouped, called twice or its outputs leave the model; they meet an addition
            whose other addend is not theirs, a grouped convolution, or an operation that mixes channels; the model
            cannot be traced.
    """
    module = check_growable(model, layer)
    walk = _Walk(dict(model.named_modules(remove_duplicate=False)), layer)
    width = module.weight.shape[0]
    seen: dict[str, int] = {}
    for node in traced(model, layer).nodes:
        if node.op == "call_module":
            seen[str(node.target)] = seen.get(str(node.target), 0) + 1
        if node.op == "call_module" and node.target == layer:
            walk.spread[node] = _Spread((0,), width, "map" if isinstance(module, nn.Conv2d) else "last")
        elif any(source in walk.spread for source in node.all_input_nodes):
            _step(walk, node)
    touched = [layer, *(reader.path for reader in (*walk.consumers, *walk.norms))]
    twice = next((path for path in touched if seen.get(path, 0) > 1), None)
    if twice:
        raise InputError(f"{twice} is used {seen[twice]} times in the model: shared layers cannot be widened alone")
    if not walk.consumers:
        raise InputError(f"layer: nothing reads {layer!r}, or the model does not call it as a module")
    return Reach(tuple(walk.consumers), tuple(walk.norms))


def _step(walk: _Walk, node: fx.Node) -> None:
    """Carry what reaches `node` on to its value, or note it as a reader."""
    if node.op == "output":
        raise InputError(f"layer: the outputs of {walk.layer!r} are outputs of the model, so they cannot be repeated")
    sources = [source for source in node.all_input_nodes if source in walk.spread]
    spread = walk.spread[sources[0]]
    if node.op == "call_module":
        following = _through_module(walk, str(node.target), spread)
    else:
        following = _through_function(walk, node, sources, spread)
    if following is not None:
        walk.spread[node] = following


def _through_module(walk: _Walk, path: str, spread: _Spread) -> _Spread | None:
    module = walk.modules[path]
    if isinstance(module, nn.Conv2d | nn.Linear):
        _refuse_groups(module, path)
        columns = module.weight.shape[1]
        positions, rest = divmod(columns, spread.total)
        wanted: tuple[Form, ...] = ("map",) if isinstance(module, nn.Conv2d) else ("flat", "last")
        if rest or spread.form not in wanted or (positions > 1 and spread.form != "flat"):
            raise _unknown(walk, f"{path}, which reads {columns} values of {spread.total} channels")
        walk.consumers.append(Reader(path, spread.offsets, positions))
        return None
    features = _per_channel(module)
    if features > 1:
        positions, rest = divmod(features, spread.total)
        if rest or (positions > 1 and spread.form != "flat"):
            raise _unknown(walk, f"{path}, which has {features} values for {spread.total} channels")
        walk.norms.append(Reader(path, spread.offsets, positions))
        return spread
    if isinstance(module, (*_POINTWISE_MODULES, nn.PReLU, nn.BatchNorm1d, nn.BatchNorm2d)):
        return spread
    if isinstance(module, _POOL_MODULES) and spread.form == "map":
        return spread
    if isinstance(module, nn.Flatten) and module.start_dim == 1 and module.end_dim == -1 and spread.form != "last":
        return _Spread(spread.offsets, spread.total, "flat")
    raise _unknown(walk, f"{path} ({type(module).__name__})")


def _per_channel(module: nn.Module) -> int:
    """Values that a BatchNorm or PReLU holds, one for each channel; 0 for other modules."""
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
        return module.num_features
    return module.num_parameters if isinstance(module, nn.PReLU) else 0


def _through_function(walk: _Walk, node: fx.Node, sources: list[fx.Node], spread: _Spread) -> _Spread | None:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    if name in _SHAPES:
        return None
    if name in _POINTWISE and len(node.all_input_nodes) == 1:
        return spread
    if name in _POOLS and spread.form == "map":
        return spread
    if name in _ARITHMETIC:
        others = [source for source in node.all_input_nodes if walk.spread.get(source) != spread]
        if others:
            raise InputError(
                f"{walk.layer} feeds {name} together with {others[0].name}: all addends must share one map of channels, "
                "so widen them together, or widen a layer inside the branch"
            )
        return spread
    if name in ("cat", "concat", "concatenate"):
        return _concatenated(walk, node, spread)
    if name in ("flatten", "view", "reshape") and spread.form != "last" and _flattens(name, node):
        return _Spread(spread.offsets, spread.total, "flat")
    if name == "mean" and spread.form == "map":
        axes = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        axes = sorted(axis % 4 for axis in ((axes,) if isinstance(axes, int) else axes or ()))  # type: ignore[union-attr, operator]
        if axes == [2, 3]:
            return (
                spread
                if node.kwargs.get("keepdim") or len(node.args) > 2
                else _Spread(spread.offsets, spread.total, "flat")
            )
    raise _unknown(walk, f"{name} ({node.name})")


def _flattens(name: str, node: fx.Node) -> bool:
    """Whether it keeps the first axis and joins all others."""
    if name == "flatten":
        first = node.args[1] if len(node.args) > 1 else node.kwargs.get("start_dim", 0)
        last = node.args[2] if len(node.args) > 2 else node.kwargs.get("end_dim", -1)
        return bool(first == 1 and last == -1)
    sizes: Any = node.args[1:] if len(node.args) != 2 or not isinstance(node.args[1], tuple | list) else node.args[1]
    return bool(len(sizes) == 2 and sizes[1] == -1)


def _concatenated(walk: _Walk, node: fx.Node, spread: _Spread) -> _Spread:
    parts = list(node.args[0] if node.args else node.kwargs["tensors"])  # type: ignore[arg-type]
    axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    axes: tuple[int, ...] = {"map": (1, -3), "last": (-1,), "flat": ()}[spread.form]  # type: ignore[assignment]
    if axis not in axes:
        raise _unknown(walk, f"a concatenation along axis {axis}")
    offsets: list[int] = []
    total = 0
    for part in parts:
        own = walk.spread.get(part)
        if own is not None:
            offsets += [total + offset for offset in own.offsets]
        total += own.total if own is not None else _width(walk, part)
    return _Spread(tuple(offsets), total, spread.form)


def _width(walk: _Walk, node: fx.Node) -> int:
    """Channels of a value that the outputs do not reach, from the layer that made it."""
    module = walk.modules.get(str(node.target)) if node.op == "call_module" else None
    if isinstance(module, nn.Conv2d | nn.Linear):
        return int(module.weight.shape[0])
    if module is not None and _per_channel(module) > 1:
        return _per_channel(module)
    name = getattr(node.target, "__name__", node.target)
    if node.op == "call_function" and name in ("cat", "concat", "concatenate"):
        return sum(_width(walk, part) for part in _nodes(node.args[0] if node.args else node.kwargs["tensors"]))
    passes = (
        isinstance(module, (*_POINTWISE_MODULES, *_POOL_MODULES, nn.PReLU)) or name in _POINTWISE | _POOLS | _ARITHMETIC
    )
    if passes and node.all_input_nodes:
        return _width(walk, node.all_input_nodes[0])
    raise _unknown(walk, f"a concatenation with {node.name}, whose width is not known")


def _nodes(value: Any) -> Iterator[fx.Node]:
    yield from (item for item in value if isinstance(item, fx.Node))


def _unknown(walk: _Walk, where: str) -> InputError:
    return InputError(
        f"the outputs of {walk.layer} reach {where}, through which channels cannot be followed: name the layers that "
        "read them (consumers)"
    )
