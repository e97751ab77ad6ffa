"""Net2Deeper: one more layer, which begins as an identity."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, fx, nn

from layerwright.core.calibration import as_calibration, evaluating
from layerwright.core.capture import first_tensor, watch_outputs
from layerwright.core.errors import InputError
from layerwright.treat.grow.growth_map import with_noise
from layerwright.treat.grow.reach import check_growable, traced

__all__ = ["deepen", "deepen_"]

M = TypeVar("M", bound=nn.Module)
Kind = Literal["conv", "linear"]
_IDEMPOTENT = (nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Identity)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def deepen(
    model: M,
    after: str,
    kind: Kind | None = None,
    kernel_size: int = 3,
    calibration: Any = None,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[M, str]:
    """A copy of `model` with one more layer, as `deepen_` makes it; `model` is left untouched."""
    deeper = copy.deepcopy(model)
    return deeper, deepen_(deeper, after, kind, kernel_size, calibration, noise, generator)


@torch.no_grad()
def deepen_(
    model: nn.Module,
    after: str,
    kind: Kind | None = None,
    kernel_size: int = 3,
    calibration: Any = None,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
) -> str:
    """Insert a layer behind `after` and its activation, in place, so that the function stays.

    The new layer has the same width, the same activation and, where `after` has one, a BatchNorm. Its kernel is the
    identity; its BatchNorm takes mean and biased variance of what it gets from the calibration data, with scale
    ``sqrt(var + eps)`` and shift ``mean``, and so is an identity in evaluation mode that normalises in training. In an
    ``nn.Sequential`` it gets places of its own, and the names of later modules move; elsewhere the activation becomes
    a short sequence.

    Args:
        model: changed.
        after: path of a Conv2d or Linear that an activation module follows, BatchNorm in between or not.
        kind: ``conv`` or ``linear``, which must be that of `after`; None takes it from there.
        kernel_size: odd; of convolutions.
        calibration: a batch of inputs, or batches, of which the first is run (64 samples in the released search).
        noise: standard deviation of the noise on the kernel, as a share of the kernel's own (0.001 there).
        generator: of the noise; seed 0 if left out.

    Returns:
        The path of the new layer.

    Raises:
        InputError: `after` is unknown or of another kind, no activation module of its own follows it, that activation
            is not idempotent (``f(f(x)) = f(x)``: ReLU, not tanh), an even kernel, or a BatchNorm and no calibration.

    Source: Chen, Goodfellow and Shlens, Net2Net, 2016; Cai et al., Efficient Architecture Search by Network
    Transformation, 2017, for BatchNorm.
    """
    try:
        old = check_growable(model, after)
    except InputError as error:
        raise InputError(str(error).replace("layer: ", "after: ", 1)) from error
    own: Kind = "conv" if isinstance(old, nn.Conv2d) else "linear"
    if kind not in (None, own):
        raise InputError(f"kind: got {kind!r}, but {after} is a {type(old).__name__}; expected {own!r}")
    if own == "conv" and (kernel_size < 1 or kernel_size % 2 == 0):
        raise InputError(f"kernel_size: got {kernel_size}, expected an odd number, so that a tap lies in the centre")
    norm, point = _insertion_point(model, after)
    activation = model.get_submodule(point)
    layer = _identity(old, kernel_size, noise, generator, bias=norm is None)
    parts: list[nn.Module] = [layer]
    if norm is not None:
        if calibration is None:
            raise InputError(
                "calibration: a BatchNorm follows the layer, so a batch of inputs is needed to make the new one an "
                "identity; pass one"
            )
        parts.append(_identity_norm(model, model.get_submodule(norm), point, calibration))
    parts.append(copy.deepcopy(activation))
    return _insert_(model, point, parts)


def _insertion_point(model: nn.Module, after: str) -> tuple[str | None, str]:
    """The BatchNorm behind `after` (None if there is none) and the activation behind both."""
    graph = traced(model, after)
    calls: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append(node)
    if len(calls.get(after, ())) != 1:
        raise InputError(f"after: {after!r} is called {len(calls.get(after, ()))} times in the model, expected once")
    norm: str | None = None
    node = calls[after][0]
    while True:
        users = list(node.users)
        path = str(users[0].target) if len(users) == 1 and users[0].op == "call_module" else ""
        module = model.get_submodule(path) if path else None
        if isinstance(module, _NORMS) and norm is None and len(calls[path]) == 1:
            norm, node = path, users[0]
            continue
        if module is None or isinstance(module, nn.Conv2d | nn.Linear | nn.Flatten):
            raise InputError(
                f"after: no activation module of its own follows {after!r}, so there is no place for a layer"
            )
        if not isinstance(module, _IDEMPOTENT):
            raise InputError(
                f"after: {type(module).__name__} follows {after!r}, and applied twice it is not what it is once; "
                "a layer can be inserted behind ReLU, ReLU6, Hardtanh or Identity"
            )
        if len(calls[path]) > 1:
            raise InputError(f"after: the activation {path} is used {len(calls[path])} times; give each layer its own")
        return norm, path


def _identity(
    old: nn.Conv2d | nn.Linear, kernel_size: int, noise: float, generator: torch.Generator | None, *, bias: bool
) -> nn.Conv2d | nn.Linear:
    width = old.weight.shape[0]
    place = {"device": old.weight.device, "dtype": old.weight.dtype}
    layer: nn.Conv2d | nn.Linear
    if isinstance(old, nn.Conv2d):
        layer = nn.utils.skip_init(nn.Conv2d, width, width, kernel_size, padding=kernel_size // 2, bias=bias, **place)
        nn.init.dirac_(layer.weight)
    else:
        layer = nn.utils.skip_init(nn.Linear, width, width, bias=bias, **place)
        nn.init.eye_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    if noise:
        layer.weight.copy_(with_noise(layer.weight, noise * layer.weight.float().std(correction=0), generator))
    return layer.requires_grad_(old.weight.requires_grad).train(old.training)


def _identity_norm(model: nn.Module, old: nn.Module, point: str, calibration: Any) -> nn.Module:
    """A BatchNorm that undoes itself on the statistics of what `point` gives."""
    data = as_calibration([calibration] if isinstance(calibration, Tensor | Mapping) else calibration)
    seen: list[Tensor] = []
    with evaluating(model), watch_outputs(model, [point], lambda _path, _args, out: seen.append(first_tensor(out))):
        data.forward(model, next(iter(data)))
    values = seen[0].double().movedim(1, 0).flatten(1)
    mean, variance = values.mean(1), values.var(1, correction=0)
    norm: Any = copy.deepcopy(old)
    if not norm.track_running_stats:
        raise InputError("calibration: the BatchNorm keeps no running statistics, so it is no fixed map")
    if not norm.affine:
        raise InputError("after: the BatchNorm has no scale and shift, so it cannot be made an identity")
    norm.running_mean = mean.to(norm.running_mean.dtype)
    norm.running_var = variance.to(norm.running_var.dtype)
    norm.num_batches_tracked.zero_()
    norm.bias.copy_(norm.running_mean)
    norm.weight.copy_((norm.running_var + norm.eps).sqrt())
    return norm  # type: ignore[no-any-return]


def _insert_(model: nn.Module, point: str, parts: list[nn.Module]) -> str:
    """Put `parts` behind the module at `point`; the path of the first."""
    parent, _, name = point.rpartition(".")
    owner = model.get_submodule(parent)
    if isinstance(owner, nn.Sequential) and type(owner).forward is nn.Sequential.forward and name.isdigit():
        place = [key for key, _ in owner.named_children()].index(name) + 1
        for number, part in enumerate(parts):
            owner.insert(place + number, part)
        return ".".join([*([parent] if parent else []), str(place)])
    setattr(owner, name, nn.Sequential(owner.get_submodule(name), *parts))
    return f"{point}.1"
