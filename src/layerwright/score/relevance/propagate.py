"""Relevance of every layer and of the input for the class that a model predicts."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from layerwright.core.calibration import evaluating, logits_of
from layerwright.core.errors import InputError
from layerwright.core.layers import list_layers
from layerwright.score.relevance.operations import Settings, hand_back
from layerwright.score.relevance.record import Operation, Record, recording
from layerwright.score.relevance.rules import EPS

__all__ = ["Relevance", "lrp"]


@dataclass(frozen=True)
class Relevance:
    """Where a class's score comes from.

    Attributes:
        by_layer: relevance at the output of every linear layer and convolution by path, and of the two products of
            attention by ``<path of the attention module>:scores`` and ``:values``; each in the shape of that output,
            with the calls as second dimension where a layer runs more than once.
        input: relevance of the input, in its shape.
        constants: ``(batch,)`` relevance that ended in learned tokens and in padding.
        target: ``(batch,)`` the classes.
        total: ``(batch,)`` relevance that was handed out at the logits.
        gradients: of the classes' logits with respect to the same outputs, where they were asked for.
    """

    by_layer: Mapping[str, Tensor]
    input: Tensor
    constants: Tensor
    target: Tensor
    total: Tensor
    gradients: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def leak(self) -> float:
        """Largest share of a sample's relevance that got lost on the way."""
        arrived = self.input.flatten(1).sum(1) + self.constants
        return float(((arrived - self.total).abs() / self.total.abs().clamp(min=1e-30)).max())


def lrp(
    model: nn.Module,
    x: Tensor,
    target: Tensor | int | None = None,
    rules: str = "alpha1beta0",
    eps: float = EPS,
    *,
    start: Literal["one_hot", "logit"] = "one_hot",
    pixels: tuple[float, float] | None = None,
    gradients: bool = False,
    attention: bool = True,
) -> Relevance:
    """Layer-wise relevance propagation (Bach et al., 2015) through a vision transformer (Chefer et al., 2021).

    One forward pass is recorded and the rules are run back over it, in float32 (float64 for a float64 model); a model of
    lower precision is copied to float32, since the rules divide by small sums. Skip paths, attention written out or
    fused, shifted windows and merged patches are followed as the model computes them. Memory: all activations of the
    batch, some three times what a training step keeps.

    Args:
        model: any module of images whose output holds logits ``(batch, classes)``; left as it is.
        x: ``(batch, channels, height, width)``.
        target: class of each sample, ``(batch,)`` or one for all; None takes the predicted ones.
        rules: of linear layers and convolutions: ``alpha<a>beta<a-1>``, such as ``alpha1beta0`` or ``alpha2beta1``.
        eps: added to the size of divisors.
        start: relevance 1 at the logit, or the logit's own value.
        pixels: bounds just beyond the lowest and highest value of `x`, for the z^B rule at the layer that reads it.
        gradients: also find the gradients of the logit at the layers' outputs.
        attention: refuse a model without a recognised attention product.

    Raises:
        TypeError: no attention was recognised, or a function without a rule; names the module.
        InputError: a class out of range, an unknown rule, or no logits.
    """
    alpha = _alpha(rules)
    x = x.detach()
    if not x.is_floating_point():
        raise TypeError(f"{type(model).__name__}: relevance starts from images, got an input of {x.dtype}")
    if _low_precision(model):
        model, x = copy.deepcopy(model).float(), x.float()
    seen = x.clone().requires_grad_()
    with evaluating(model), torch.enable_grad():
        with recording(model, seen) as record:
            output = model(seen)
        logits = logits_of(output)
    if logits.dim() != 2:
        raise InputError(f"{type(model).__name__}: expected logits (batch, classes), got {tuple(logits.shape)}")
    if attention and not any(operation.product == "values" for operation in record.operations):
        raise TypeError(
            f"{type(model).__name__}: no attention was recognised in it (probabilities from a softmax, times values); "
            "relevance is for vision transformers"
        )
    number = record.number(logits)
    if number is None:
        raise InputError(f"{type(model).__name__}: its logits do not depend on the input by operations that are known")
    classes = _target(target, logits.detach())
    chosen = logits.detach().gather(1, classes[:, None]).squeeze(1)
    chosen = chosen.to(torch.promote_types(chosen.dtype, torch.float32))
    total = chosen if start == "logit" else torch.ones_like(chosen)
    if bool((total == 0).any()):
        warnings.warn("lrp: the logit of the class is 0 for some samples; their relevance starts from 1", stacklevel=2)
        total = torch.where(total == 0, torch.ones_like(total), total)
    names = _names(model, record)
    values: dict[int, Tensor] = {}
    first = torch.zeros_like(logits, dtype=total.dtype).scatter(1, classes[:, None], total[:, None])
    at, constants = _walk(record, number, first, Settings(alpha, eps, pixels), values)
    by_layer = _gather(names, {o.outputs[0][0]: at.get(o.outputs[0][0]) for o in record.operations if _wanted(o)})
    found: dict[str, Tensor] = {}
    if gradients:
        with torch.enable_grad():
            wanted = [operation.outputs[0] for operation in record.operations if _wanted(operation)]
            score = logits.gather(1, classes[:, None]).sum()
            slopes = torch.autograd.grad(score, [t for _, t in wanted], allow_unused=True)
        wide = {n: None if g is None else g.to(total.dtype) for (n, _), g in zip(wanted, slopes, strict=True)}
        found = _gather(names, wide)
    arrived = at.get(0, torch.zeros_like(x, dtype=total.dtype))
    return Relevance(by_layer, arrived, constants, classes, total, found)


def _low_precision(model: nn.Module) -> bool:
    return any(p.is_floating_point() and p.dtype not in (torch.float32, torch.float64) for p in model.parameters())


def _walk(
    record: Record, number: int, first: Tensor, settings: Settings, values: dict[int, Tensor]
) -> tuple[dict[int, Tensor], Tensor]:
    """Relevance of the input and of layers' outputs by number of value, and what constants took."""
    values[number] = first
    kept: dict[int, Tensor] = {}
    constants = torch.zeros_like(first[:, 0])
    for operation in reversed(record.operations):
        back = [values.pop(n, None) for n, _ in operation.outputs]
        if all(r is None for r in back):
            continue
        if _wanted(operation) and back[0] is not None:
            kept[operation.outputs[0][0]] = back[0]
        handed = hand_back(operation, back, settings)
        if operation.name in ("cat", "concat", "concatenate", "stack", "pad", "constant_pad_nd"):
            constants = constants + _missing(back, handed, len(constants))
        for n, r in handed:
            values[n] = values[n] + r if n in values else r
    if 0 in values:
        kept[0] = values[0]
    return kept, constants


def _missing(back: list[Tensor | None], handed: list[tuple[int, Tensor]], batch: int) -> Tensor | float:
    """Per sample, what went in and did not come out."""
    given = sum(r.sum(tuple(range(1, r.dim()))) for r in back if r is not None)
    taken = sum(r.sum(tuple(range(1, r.dim()))) for _, r in handed)
    if isinstance(given, Tensor) and isinstance(taken, Tensor) and given.shape == taken.shape == (batch,):
        return given - taken
    return 0.0


def _wanted(operation: Operation) -> bool:
    return bool(operation.product) or operation.name in ("linear", "addmm", "conv1d", "conv2d", "conv3d")


def _names(model: nn.Module, record: Record) -> dict[int, str]:
    """What each wanted value is called."""
    modules = {ref.path for ref in list_layers(model) if ref.kind == "attention"}
    names = {}
    for operation in record.operations:
        if _wanted(operation):
            path = operation.module
            if operation.product:
                parts = path.split(".")
                inside = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
                path = f"{next((p for p in inside if p in modules), path)}:{operation.product}"
            names[operation.outputs[0][0]] = path
    return names


def _gather(names: Mapping[int, str], values: Mapping[int, Tensor | None]) -> dict[str, Tensor]:
    """By name; a layer that ran more than once has its calls as second dimension."""
    found: dict[str, list[Tensor]] = {}
    for number, name in names.items():
        value = values.get(number)
        if value is not None:
            found.setdefault(name, []).append(value)
    return {name: parts[0] if len(parts) == 1 else torch.stack(parts, 1) for name, parts in found.items()}


def _alpha(rules: str) -> float:
    match = re.fullmatch(r"alpha(\d+(?:\.\d+)?)beta(\d+(?:\.\d+)?)", rules)
    if match is None or abs(float(match[1]) - 1 - float(match[2])) > 1e-9:
        raise InputError(f"rules: got {rules!r}, expected alpha<a>beta<a-1>, such as alpha1beta0 or alpha2beta1")
    return float(match[1])


def _target(target: Any, logits: Tensor) -> Tensor:
    batch, classes = logits.shape
    if target is None:
        return logits.argmax(1)
    found = torch.as_tensor(target, device=logits.device)
    if found.is_floating_point() or found.shape not in ((), (batch,)):
        raise InputError(f"target: got {target!r}, expected one class or {batch} of them")
    if bool(((found < 0) | (found >= classes)).any()):
        wrong = int(found.flatten()[((found < 0) | (found >= classes)).flatten()][0])
        raise InputError(f"target: got class {wrong}, the model has classes 0 to {classes - 1}")
    return found.long().expand(batch)
