"""LayerNorm Scaling: norms of deep blocks give less, so that the residual stream does not drown what they add."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from layerwright.core.blocks import find_blocks
from layerwright.core.calibration import Calibration, as_calibration
from layerwright.core.errors import InputError
from layerwright.core.layers import structure_copy
from layerwright.nn.attached import attached, detach_
from layerwright.nn.norm_scale import NormScale
from layerwright.treat.migrate import NormReaders, find_norm_readers, norm_offset

__all__ = ["LayerNormScaling", "apply_layernorm_scaling", "find_layernorm_scaling"]


class LayerNormScaling:
    """The scaled norms of a model.

    Args:
        model: with scaled norms.
        norms: their paths.
    """

    def __init__(self, model: nn.Module, norms: Sequence[str]) -> None:
        self.model, self.norms = model, tuple(norms)

    def factors(self) -> dict[str, float]:
        """The factor of each norm, by path."""
        found = {path: attached(self.model.get_submodule(path), NormScale.child) for path in self.norms}
        return {path: scale.factor for path, scale in found.items() if isinstance(scale, NormScale)}

    def remove(self) -> nn.Module:
        """Take the factors away, in place. Returns the model."""
        for path in self.norms:
            detach_(self.model.get_submodule(path), NormScale.child)
        return self.model

    @torch.no_grad()
    def fold_(self) -> nn.Module:
        """Multiply the norms' gains (and biases) by their factors and take the factors away, in place.

        The result computes the same and is a plain model that any program loads. It trains differently: gains have
        other gradients and another decay.

        Raises:
            InputError: a norm without a gain; nothing is changed then.
        """
        factors = self.factors()
        for path in factors:
            if not isinstance(getattr(self.model.get_submodule(path), "weight", None), Tensor):
                raise InputError(f"{path}: a norm without a gain cannot take up its factor; keep the model as it is")
        for path, factor in factors.items():
            norm: Any = self.model.get_submodule(path)
            detach_(norm, NormScale.child)
            offset = norm_offset(norm)
            values = {"weight": (norm.weight.double() + offset) * factor - offset}
            if isinstance(getattr(norm, "bias", None), Tensor):
                values["bias"] = norm.bias.double() * factor
            for name, value in values.items():
                old = norm._parameters[name]
                norm._parameters[name] = nn.Parameter(value.to(old.dtype), requires_grad=old.requires_grad)
        return self.model


def apply_layernorm_scaling(
    model: nn.Module,
    layers: Sequence[int] | None = None,
    *,
    start: int = 1,
    power: float = 0.5,
    calibration: Calibration | Any = None,
    copy: bool = True,
) -> LayerNormScaling:
    """Divide what each norm before attention or a feed-forward part gives by ``sqrt(l)``, l the block's number from 1.

    The factor comes after the gain, in both parts of block `l`; the norm before the output layer is left alone (Sun et
    al., 2025, *The Curse of Depth in Large Language Models*, arXiv 2502.05795). It is meant for training from the start
    with plain initialisation: output projections that begin ``1 / sqrt(2 L)`` times as large undo its gain.

    Norms are found by following one batch: those whose output is read by linear layers of a block and by nothing else.

    Args:
        model: of blocks with norms before their parts (Llama, GPT-2, ViT, ...).
        layers: blocks whose norms are scaled, from 0; None for all.
        start: the number of the first block.
        power: the factor is ``l ** -power``; 0 changes nothing.
        calibration: batches to follow one of; not needed for Hugging Face models, which know their own inputs.
        copy: leave `model` alone; the result shares its tensors. False changes it.

    Raises:
        InputError: norms after their parts, no norms that can be told, a block that is not there, a negative power, or a
            model whose norms are scaled already.
    """
    if not power >= 0:
        raise InputError(f"power: got {power}, expected 0 or more")
    if start < 1:
        raise InputError(f"start: got {start}, expected 1 or more")
    if find_layernorm_scaling(model) is not None:
        raise InputError(f"{type(model).__name__} has scaled norms already; remove them first")
    stacks = find_blocks(model)
    depth = max(len(stack) for stack in stacks)
    wanted = range(depth) if layers is None else layers
    outside = [layer for layer in wanted if isinstance(layer, bool) or not 0 <= layer < depth]
    if outside:
        raise InputError(f"layers: got {outside[0]}, expected numbers from 0 to {depth - 1}")
    data = as_calibration(_own_inputs(model) if calibration is None else calibration)
    result = structure_copy(model) if copy else model
    scaled: list[str] = []
    numbered = {name: number for stack in stacks for number, name in enumerate(stack.names)}
    for group in _pre_norms(model, find_norm_readers(model, data), numbered):
        number = next(n for name, n in numbered.items() if group.norm.startswith(name + "."))
        if number in wanted:
            NormScale((number + start) ** -power).attach_(result.get_submodule(group.norm))
            scaled.append(group.norm)
    return LayerNormScaling(result, scaled)


def find_layernorm_scaling(model: nn.Module) -> LayerNormScaling | None:
    """The handle of a model whose norms are scaled (a loaded or copied one), None if they are not."""
    paths = [name.rpartition(".")[0] for name, module in model.named_modules() if isinstance(module, NormScale)]
    return LayerNormScaling(model, paths) if paths else None


def _own_inputs(model: nn.Module) -> list[dict[str, Tensor]]:
    inputs = getattr(model, "dummy_inputs", None)
    if not isinstance(inputs, dict):
        raise InputError(
            f"{type(model).__name__}: give calibration=, a list with one batch, so that norms can be found"
        )
    device = next(model.parameters()).device
    vocabulary = getattr(model.config, "vocab_size", None)
    found = {name: value.to(device) for name, value in inputs.items() if isinstance(value, Tensor)}
    if vocabulary and "input_ids" in found:
        found["input_ids"] = found["input_ids"] % vocabulary
    return [found]


def _pre_norms(model: nn.Module, groups: Sequence[NormReaders], blocks: dict[str, int]) -> list[NormReaders]:
    """Norms inside blocks that only linear layers read.

    Raises:
        InputError: there are none, or some are read by the residual stream: norms after their parts.
    """
    inside = [group for group in groups if any(group.norm.startswith(name + ".") for name in blocks)]
    plain = [group for group in inside if not group.others]
    after = [group for group in inside if group.others]
    if not plain or after:
        told = (
            f"norms that the residual stream reads too ({after[0].norm})" if after else "no norm before a linear layer"
        )
        seen = [name for name, module in model.named_modules() if "norm" in type(module).__name__.lower()]
        raise InputError(
            f"{type(model).__name__}: found {told}; LayerNorm Scaling needs norms before attention and feed-forward "
            f"parts (norms of this model: {', '.join(seen[:4]) or 'none'})"
        )
    return plain
