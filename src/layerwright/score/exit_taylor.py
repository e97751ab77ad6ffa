"""What heads and neurons are worth to all exits at once: weights times gradients, summed without their signs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from layerwright.core.attention_heads import attention_heads
from layerwright.core.calibration import Calibration, as_calibration, evaluating
from layerwright.core.errors import InputError
from layerwright.core.layer import LayerRef, get_parameter, to_matrices
from layerwright.core.layers import list_layers

__all__ = ["UnitScores", "exit_taylor", "taylor_magnitude"]

BatchLoss = Callable[[nn.Module, Any], Tensor]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class UnitScores:
    """Scores of one block, float32; higher is worth more.

    Attributes:
        heads: ``(heads,)``.
        neurons: ``(neurons,)``.
    """

    heads: Tensor
    neurons: Tensor


def taylor_magnitude(
    model: nn.Module,
    calibration: Calibration | Any,
    names: Sequence[str],
    loss: BatchLoss,
    *,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """``|theta * sum over batches of |gradient||`` of the parameters called `names`, in float32.

    The absolute value is taken for each batch before the sum: batches that pull a weight in opposite directions do not
    cancel. The model runs in evaluation mode, so dropout is off; its flags and gradients stay as they are.

    Args:
        model: any.
        calibration: batches.
        names: full names of parameters.
        loss: ``loss(model, batch) -> scalar``.
        progress: ``progress(name, done, total)``.

    Raises:
        InputError: a loss that does not depend on one of them, or is not finite.
    """
    data = as_calibration(calibration)
    parameters = [get_parameter(model, name) for name in names]
    flags = [parameter.requires_grad for parameter in parameters]
    sums = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
    total = len(data)
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        with evaluating(model), torch.enable_grad():
            for number, batch in enumerate(data):
                value = loss(model, batch)
                if not torch.isfinite(value):
                    raise InputError(f"scores: the loss of batch {number} is not finite")
                gradients = torch.autograd.grad(value, parameters, allow_unused=True)
                for name, own, gradient in zip(names, sums, gradients, strict=True):
                    if gradient is None:
                        raise InputError(f"scores: the loss does not depend on {name}")
                    own += gradient.float().abs()
                if progress:
                    progress("scoring", number + 1, total)
    finally:
        for parameter, flag in zip(parameters, flags, strict=True):
            parameter.requires_grad_(flag)
    return {
        name: (parameter.detach().float() * own).abs()
        for name, parameter, own in zip(names, parameters, sums, strict=True)
    }


def exit_taylor(
    model: nn.Module, calibration: Calibration | Any, loss: BatchLoss, *, progress: Progress | None = None
) -> dict[str, UnitScores]:
    """Scores of all heads and neurons by the path of their block (Shen et al., 2022, COST-EFF, arXiv 2210.15523).

    With ``S = |theta * sum |gradient||`` (see `taylor_magnitude`): a head is the sum of ``S`` over its columns of the output
    projection; a neuron the sum over its row of the layers that compute it and its column of the layer that reads it.
    With a `loss` that sums all exits (``MultiExitDistillation``) a unit counts by what it does for every exit
    above it. One backward pass for each batch; memory: the scored weights once more in float32.

    Args:
        model: an encoder, or a `MultiExit` around one (paths then begin with ``model.``); left as it is.
        calibration: batches.
        loss: ``loss(model, batch) -> scalar``.
        progress: ``progress(name, done, total)``.

    Raises:
        TypeError: no block has separate heads and a plain feed-forward part.
        InputError: a loss that is not finite, or does not depend on a layer.
    """
    refs = list_layers(model)
    attention = attention_heads(model, refs)
    inside = {path: _mlp(refs, part.o) for path, part in attention.items()}
    blocks = {path: parts for path, parts in inside.items() if parts is not None}
    if not blocks:
        raise TypeError(f"model: {type(model).__name__} has no block with separate heads and a plain feed-forward part")
    named = {ref.parameter: ref for path, (down, ups) in blocks.items() for ref in (attention[path].o, down, *ups)}
    found = taylor_magnitude(model, calibration, list(named), loss, progress=progress)
    values = {name: to_matrices(found[name], ref.layout)[0] for name, ref in named.items()}
    scores: dict[str, UnitScores] = {}
    for path, (down, ups) in blocks.items():
        part = attention[path]
        heads = values[part.o.parameter].sum(0).view(part.heads, part.head_size).sum(1)
        neurons = values[down.parameter].sum(0)
        for ref in ups:
            neurons = neurons + values[ref.parameter].sum(1).view(-1, len(neurons)).sum(0)
        scores[path] = UnitScores(heads, neurons)
    return scores


def _mlp(refs: Sequence[LayerRef], o: LayerRef) -> tuple[LayerRef, list[LayerRef]] | None:
    """The layer that reads the inner neurons and those that compute them, in the block of `o`."""
    own = [ref for ref in refs if (ref.stack, ref.block) == (o.stack, o.block) and ref.count == 1]
    downs = [ref for ref in own if ref.role == "down"]
    ups = [ref for ref in own if ref.role in ("up", "gate", "gate_up")]
    if len(downs) != 1 or not ups or any(ref.shape[0] % downs[0].shape[1] for ref in ups):
        return None
    return downs[0], ups
