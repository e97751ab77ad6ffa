"""Guided backpropagation: what in the picture raises one unit, for networks of rectified units."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from layerwright.core.calibration import evaluating, logits_of
from layerwright.core.capture import first_tensor
from layerwright.core.errors import InputError, unknown_name
from layerwright.core.layers import structure_copy

__all__ = ["GuidedBackprop", "randomization_check"]

Mode = Literal["guided", "deconv", "grad"]
Unit = tuple[str, int, tuple[int, ...]]
"""Path of a layer, channel, and position within the channel's map (empty for a vector)."""
MODES: tuple[Mode, ...] = ("guided", "deconv", "grad")


class GuidedBackprop:
    """Maps of the pixels that raise a unit, by three rules for the signal `R` that comes back to a ReLU with input `f`.

    ``grad``: ``1[f > 0] R``, the gradient. ``deconv``: ``1[R > 0] R`` (Zeiler and Fergus, 2014). ``guided``: both
    (Springenberg et al., 2015, arXiv 1412.6806). Everything else is ordinary backward. Rectifications are found where
    they run, as modules or functions, in place or not, also of modules that run several times; ReLU6 passes signals
    where ``0 < f < 6``. The model is not changed, and its gradients are left as they are.

    Guided maps depend little on the class (Nie et al., 2018); see `randomization_check`.

    Args:
        model: from images ``(batch, channels, height, width)`` to logits.
        mode: the rule.
        generalised: treat GELU, SiLU and the like too, as open where their output is positive.

    Raises:
        InputError: an unknown mode.
    """

    def __init__(self, model: nn.Module, mode: Mode = "guided", *, generalised: bool = False) -> None:
        if mode not in MODES:
            raise unknown_name("mode", mode, MODES)
        self.model, self.mode, self.generalised = model, mode, generalised

    def __call__(
        self, images: Tensor, target: int | Tensor | Unit, *, start: Literal["one", "activation"] = "one"
    ) -> Tensor:
        """The map ``(batch, channels, height, width)`` of one unit for each picture.

        Args:
            images: floating point.
            target: a class, one class a picture ``(batch,)``, or ``(layer, channel, position)``.
            start: the signal at the unit: 1, or the unit's own value.

        Raises:
            InputError: pictures without a batch axis, a target that is not there, a model without ReLU, or an
                activation that is no rectification.
        """
        if images.dim() != 4:
            raise InputError(f"images: got shape {tuple(images.shape)}, expected (batch, channels, height, width)")
        seen: list[Tensor] = []
        layer = target[0] if isinstance(target, tuple) else None
        pixels = images.detach().clone().requires_grad_()
        rule = _Rules(self.mode, self.generalised)
        with evaluating(self.model), torch.enable_grad(), _watched(self.model, layer, seen, rule), rule:
            logits = logits_of(self.model(pixels))
        if not rule.found:
            raise InputError(f"model: {type(self.model).__name__} runs no ReLU, for which {self.mode} maps are defined")
        chosen = _unit(seen[0] if layer is not None else logits, target)
        signal = chosen.detach() if start == "activation" else torch.ones_like(chosen)
        (found,) = torch.autograd.grad(chosen, pixels, signal)
        return found


def _unit(values: Tensor, target: int | Tensor | Unit) -> Tensor:
    """The chosen number of each picture ``(batch,)``."""
    if not isinstance(target, tuple):
        classes = values.shape[1]
        wanted = torch.as_tensor(target, device=values.device).expand(len(values))
        if int(wanted.min()) < 0 or int(wanted.max()) >= classes:
            raise InputError(f"target: got class {wanted.unique().tolist()}, expected 0 to {classes - 1}")
        return values.gather(1, wanted[:, None].long())[:, 0]
    _, channel, position = target
    place: tuple[int, ...] = (channel, *position)
    if len(place) != values.dim() - 1 or any(not 0 <= p < n for p, n in zip(place, values.shape[1:], strict=False)):
        raise InputError(f"target: got unit {place}, expected a place in {tuple(values.shape[1:])}")
    flat = values.flatten(1)
    return flat[:, int(np.ravel_multi_index(place, values.shape[1:]))]


@contextmanager
def _watched(model: nn.Module, layer: str | None, seen: list[Tensor], rule: _Rules) -> Iterator[None]:
    """Keep what `layer` gives, and the path of the module that runs."""
    modules = dict(model.named_modules())
    if layer is not None and layer not in modules:
        raise unknown_name("layer", layer, modules)
    handles = [
        module.register_forward_pre_hook(lambda _module, _args, path=path: rule.enter(path))
        for path, module in modules.items()
        if not list(module.children())
    ]
    if layer is not None:
        handles.append(modules[layer].register_forward_hook(lambda _m, _a, output: seen.append(first_tensor(output))))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if layer is not None and not seen:
        raise InputError(f"target: {layer} does not run")


_RELU = {torch.relu, Tensor.relu, functional.relu}
_RELU_IN_PLACE = {torch.relu_, Tensor.relu_}
_OTHERS: set[Callable[..., Any]] = {
    functional.gelu, functional.silu, functional.elu, functional.leaky_relu, functional.softplus, functional.mish,
    functional.hardswish, functional.celu, functional.selu, torch.selu, torch.celu, torch.prelu, functional.prelu,
    functional.rrelu, torch.rrelu, functional.hardsigmoid, functional.tanh, torch.tanh, Tensor.tanh,
}  # fmt: skip


class _Rules(TorchFunctionMode):
    """Gives every rectification that runs the backward rule of a mode."""

    def __init__(self, mode: Mode, generalised: bool) -> None:
        super().__init__()
        self.mode, self.generalised = mode, generalised
        self.found = False
        self._path = ""

    def enter(self, path: str) -> None:
        """Remember the module that runs."""
        self._path = path

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _OTHERS and not self.generalised:
            raise InputError(
                f"model: {self._path or 'it'} runs {func.__name__}, which is no ReLU; set generalised=True to open it where "
                "its output is positive"
            )
        top = _top(func, args, kwargs)
        rectifies = func in _RELU or func in _RELU_IN_PLACE or top is not None
        if not rectifies and func not in _OTHERS:
            return func(*args, **kwargs)
        self.found = True
        if self.mode == "grad":
            return func(*args, **kwargs)
        x = args[0] if args else kwargs["input"]
        if not rectifies:
            output: Tensor = _OpenWherePositive.apply(func(*args, **kwargs).detach(), x, self.mode == "guided")
            return output
        output = _Rectify.apply(x, top, self.mode == "guided")
        in_place = func in _RELU_IN_PLACE or bool(kwargs.get("inplace", False))
        return x.copy_(output) if in_place and not (x.is_leaf and x.requires_grad) else output


def _top(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> float | None:
    """The upper end of a clipped rectification, or None if `func` is none."""
    if func is functional.relu6:
        return 6.0
    if func is functional.hardtanh:
        low = args[1] if len(args) > 1 else kwargs.get("min_val", -1.0)
        high = args[2] if len(args) > 2 else kwargs.get("max_val", 1.0)
        return float(high) if low == 0 else None
    return None


class _Rectify(torch.autograd.Function):
    """ReLU whose signal comes back positive only, and with `guided` only where the unit was open."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, top: float | None, guided: bool) -> Tensor:
        output = x.clamp(min=0, max=top)
        ctx.guided = guided
        ctx.save_for_backward(x > 0 if top is None else (x > 0) & (x < top))
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (signal,) = grads
        (opened,) = ctx.saved_tensors
        passed = signal.clamp_min(0)
        return passed * opened if ctx.guided else passed, None, None


class _OpenWherePositive(torch.autograd.Function):
    """Another activation, as a rectification of its output."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, guided: bool) -> Tensor:
        ctx.guided = guided
        ctx.save_for_backward(output > 0)
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        (signal,) = grads
        (opened,) = ctx.saved_tensors
        passed = signal.clamp_min(0)
        return None, passed * opened if ctx.guided else passed, None


def randomization_check(
    model: nn.Module, explain: Callable[[nn.Module, Tensor], Tensor], images: Tensor, *, seed: int = 0
) -> list[tuple[str, float]]:
    """Whether maps depend on what the model has learnt: rank correlation with the maps of ever more random models.

    The weights of one layer after the other are shuffled, from the last to the first, each on top of those before. A
    faithful method falls to zero soon; guided backpropagation does not (Adebayo et al., "Sanity Checks for Saliency
    Maps", 2018).

    Args:
        model: from images to logits.
        explain: ``explain(model, images)`` gives maps ``(batch, ...)``.
        images: ``(batch, channels, height, width)``.
        seed: of the shuffles.

    Returns:
        Each layer and the mean over pictures of Spearman's correlation of the maps' magnitudes once it is shuffled.

    Raises:
        InputError: no layer with a matrix of weights.
    """
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.modules.conv._ConvNd)]
    if not layers:
        raise InputError("model: no linear layer or convolution to shuffle")
    whole = _ranks(explain(model, images))
    shuffled = structure_copy(model)
    draw = torch.Generator().manual_seed(seed)
    found = []
    for name in reversed(layers):
        module: Any = shuffled.get_submodule(name)
        weight = module.weight.detach()
        order = torch.randperm(weight.numel(), generator=draw).to(weight.device)
        module.weight = nn.Parameter(weight.flatten()[order].reshape(weight.shape))
        ranks = _ranks(explain(shuffled, images))
        found.append((name, float((whole * ranks).sum(1).mean())))
    return found


def _ranks(maps: Tensor) -> Tensor:
    """Ranks of the magnitudes of each map, centred, of unit length."""
    ranks = maps.detach().abs().flatten(1).argsort(1).argsort(1).double()
    ranks = ranks - ranks.mean(1, keepdim=True)
    return functional.normalize(ranks, dim=1)
