"""The weight scales of a block as one vector that can be set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from layerwright.core.blocks import find_blocks
from layerwright.core.errors import InputError, unknown_name
from layerwright.core.layer import read_matrix
from layerwright.core.layers import list_layers
from layerwright.nn.quantized_weight import QuantizedWeight
from layerwright.nn.quantizer import quantize

__all__ = ["BlockScales", "blocks_with_scales"]


@dataclass(frozen=True)
class BlockScales:
    """Quantized layers of one block.

    Attributes:
        path: of the block.
        layers: paths and modules.
        weights: by path, the weight ``(out, in)`` or ``(count, out, in)`` that codes are rounded from anew whenever a
            scale moves; a layer without one keeps its codes.
    """

    path: str
    layers: tuple[tuple[str, QuantizedWeight], ...]
    weights: Mapping[str, Tensor]

    def read(self) -> Tensor:
        """All scales, float32 ``(scales,)``."""
        return torch.cat([module.weight_scale.detach().float().flatten() for _, module in self.layers])

    def write_(self, theta: Tensor) -> None:
        """Set them, rounded to their dtype, and refresh codes."""
        sizes = [module.weight_scale.numel() for _, module in self.layers]
        for (path, module), part in zip(self.layers, theta.split(sizes), strict=True):
            module.set_scale_(part.reshape(module.weight_scale.shape), self.weights.get(path))

    def steps(self, by_bits: Mapping[int, float]) -> Tensor:
        """The number that `by_bits` gives for each scale's layer, ``(scales,)``."""
        return torch.cat([torch.full((m.weight_scale.numel(),), by_bits[m.quantize.bits]) for _, m in self.layers])

    def saved(self) -> list[dict[str, Tensor | None]]:
        """The buffers of all layers, to be put back by `restore_`."""
        return [dict(module._buffers) for _, module in self.layers]

    def restore_(self, saved: Sequence[Mapping[str, Tensor | None]]) -> None:
        """Put back what `saved` returned."""
        for (_, module), buffers in zip(self.layers, saved, strict=True):
            module._buffers.update(buffers)
            module.forget()


def blocks_with_scales(
    model: nn.Module, paths: Sequence[str] | None = None, reference: nn.Module | None = None
) -> tuple[BlockScales, ...]:
    """The blocks of `model` whose scales can be moved, in the model's order.

    Args:
        model: with packed integer weights.
        paths: modules; None takes the attention modules, where there are none the model's blocks, and where there are
            no blocks each quantized layer by itself.
        reference: the model that the weights came from. A layer's codes follow its scales where rounding the
            reference's weight to the present grid gives the present codes; others (GPTQ's) keep theirs.

    Raises:
        TypeError: no layer of the model has weight scales.
        InputError: no paths, an unknown one, or one without quantized layers.
    """
    everything = {path: m for path, m in model.named_modules() if isinstance(m, QuantizedWeight)}
    if not everything:
        raise TypeError(f"{type(model).__name__} has no weight scales: give it packed integer weights first (Quantize)")
    if paths is not None:
        if not paths:
            raise InputError("blocks: the list is empty; name modules, or leave it out")
        known = dict(model.named_modules())
        for path in paths:
            if path not in known:
                raise unknown_name("block", path, known)
    wanted = set(_default(model, everything) if paths is None else paths)
    chosen = [path for path, _ in model.named_modules() if path in wanted]
    sources = {} if reference is None else {ref.path: ref for ref in list_layers(reference)}
    found = []
    for block in chosen:
        inside = {p: m for p, m in everything.items() if p == block or p.startswith(block + ".") or not block}
        if not inside:
            raise InputError(f"{block}: it holds no quantized layer; leave it out")
        weights = {}
        for path, module in inside.items():
            ref = sources.get(path)
            if reference is not None and ref is not None and ref.layout != "none":
                weight = read_matrix(reference, ref)
                weight = weight if module.stacked else weight[0]
                if _reproduced(module, weight):
                    weights[path] = weight
        found.append(BlockScales(block, tuple(inside.items()), weights))
    return tuple(found)


def _default(model: nn.Module, quantized: Mapping[str, QuantizedWeight]) -> list[str]:
    attention = [ref.path for ref in list_layers(model) if ref.kind == "attention"]
    try:
        blocks = [path for stack in find_blocks(model) for path in stack.names]
    except InputError:
        blocks = []
    for paths in (attention, blocks):
        used = [path for path in paths if any(p == path or p.startswith(path + ".") for p in quantized)]
        if used:
            return used
    return list(quantized)


def _reproduced(module: QuantizedWeight, weight: Tensor) -> bool:
    if weight.shape != (*module.weight_scale.shape[:-1], module.columns):
        return False
    codes = quantize(weight.float(), module.weight_scale.float(), module.weight_zero, module.quantize.bits)
    rows = codes.reshape(-1, module.rows, module.columns)
    return all(torch.equal(module.codes(part, 0, module.rows), rows[part]) for part in range(module.count))
