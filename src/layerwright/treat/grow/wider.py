"""Net2Wider: more outputs of a layer, the same function."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from layerwright.core.errors import InputError
from layerwright.treat.grow.growth_map import GrowthMap, growth_map, widen_consumer, widen_producer
from layerwright.treat.grow.reach import Reach, Reader, check_growable, find_reach

__all__ = ["grow_readers_", "widen", "widen_"]

M = TypeVar("M", bound=nn.Module)


def widen(
    model: M,
    layer: str,
    new_width: int,
    consumers: Sequence[str | Reader] | None = None,
    generator: torch.Generator | None = None,
    noise: float = 0.0,
) -> tuple[M, GrowthMap]:
    """A copy of `model` with a wider layer, as `widen_` makes it; `model` is left untouched."""
    wider = copy.deepcopy(model)
    return wider, widen_(wider, layer, new_width, consumers, generator, noise)


@torch.no_grad()
def widen_(
    model: nn.Module,
    layer: str,
    new_width: int,
    consumers: Sequence[str | Reader] | None = None,
    generator: torch.Generator | None = None,
    noise: float = 0.0,
) -> GrowthMap:
    """Give `layer` `new_width` outputs, in place: the new ones repeat old ones, and their readers are divided.

    Exact in evaluation mode for activations that work on single values, for pools and for BatchNorm; a concatenation
    and what reads it follow. With dropout, training differs. Cost: the size of the weights.

    Args:
        model: changed; its tensors are replaced, not written to.
        layer: path of a Conv2d (not grouped) or Linear.
        new_width: outputs afterwards, more than now.
        consumers: what reads them: paths of layers, and of BatchNorms on the way; found by ``torch.fx`` if left out.
        generator: of the map and the noise; seed 0 if left out.
        noise: standard deviation of the noise on the new outputs, as a share of the weight's own. The released search
            uses 0.01; with 0 the copies stay equal when they are trained.

    Returns:
        Which output each repeats.

    Raises:
        InputError: `new_width` is not larger, the layer is unknown or of another kind, or see `find_reach`.

    Source: Chen, Goodfellow and Shlens, Net2Net, 2016; Cai et al., Efficient Architecture Search by Network
    Transformation, 2017, for BatchNorm and concatenation.
    """
    module = check_growable(model, layer)
    growth = growth_map(module.weight.shape[0], new_width, generator)
    reach = find_reach(model, layer) if consumers is None else _given(model, growth.width, consumers)
    module.weight = _like(module.weight, widen_producer(module.weight.detach(), growth, noise, generator))
    if module.bias is not None:
        module.bias = _like(module.bias, widen_producer(module.bias.detach(), growth))
    _set_width(module, outputs=new_width)
    grow_readers_(model, reach, growth)
    return growth


@torch.no_grad()
def grow_readers_(model: nn.Module, reach: Reach, growth: GrowthMap) -> None:
    """Let everything in `reach` take `growth` in, in place: norms are gathered, weights gathered and divided."""
    for reader in reach.norms:
        norm = model.get_submodule(reader.path)
        # From the last occurrence on, so that earlier offsets stay true.
        for offset in sorted(reader.offsets, reverse=True):
            _gather_norm_(norm, growth, offset, reader.positions)
    for reader in reach.consumers:
        module = model.get_submodule(reader.path)
        weight = module.weight.detach()  # type: ignore[union-attr, operator]
        for offset in sorted(reader.offsets, reverse=True):
            weight = widen_consumer(weight, growth, offset, reader.positions)
        module.weight = _like(module.weight, weight)  # type: ignore[arg-type]
        _set_width(module, inputs=weight.shape[1])


def _gather_norm_(norm: nn.Module, growth: GrowthMap, offset: int, positions: int) -> None:
    """Tensors of a BatchNorm or PReLU, by channel: repeated, not divided."""
    width = "num_parameters" if isinstance(norm, nn.PReLU) else "num_features"
    features = int(getattr(norm, width))
    own = growth.extended(offset, features // positions - offset - growth.width).repeated(positions)
    for name, parameter in list(norm.named_parameters(recurse=False)):
        setattr(norm, name, _like(parameter, widen_producer(parameter.detach(), own)))
    for name, buffer in list(norm.named_buffers(recurse=False)):
        if buffer.dim() == 1:
            setattr(norm, name, widen_producer(buffer, own))
    setattr(norm, width, own.new_width)


def _given(model: nn.Module, width: int, consumers: Sequence[str | Reader]) -> Reach:
    """The reach that the caller names."""
    readers: list[Reader] = []
    norms: list[Reader] = []
    for item in consumers:
        reader = item if isinstance(item, Reader) else Reader(item)
        try:
            module = model.get_submodule(reader.path)
        except AttributeError as error:
            raise InputError(f"consumers: there is no {reader.path!r} in {type(model).__name__}") from error
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            norms.append(_fitting(reader, module.num_features, width, item))
        else:
            columns = check_growable(model, reader.path).weight.shape[1]
            readers.append(_fitting(reader, columns, width, item))
    if not readers:
        raise InputError(f"consumers: got {list(consumers)}, expected at least one layer that reads the outputs")
    return Reach(tuple(readers), tuple(norms))


def _fitting(reader: Reader, columns: int, width: int, given: str | Reader) -> Reader:
    """A reader that was only named reads all of the channels, each at as many positions as fit."""
    if isinstance(given, Reader):
        if columns % given.positions or max(given.offsets) + width > columns // given.positions:
            raise InputError(f"consumers: {given} does not fit the {columns} inputs of that layer")
        return reader
    if columns % width:
        raise InputError(f"consumers: {reader.path} reads {columns} values, which is no multiple of {width} outputs")
    return Reader(reader.path, (0,), columns // width)


def _like(old: Tensor, new: Tensor) -> nn.Parameter:
    return nn.Parameter(new.contiguous(), requires_grad=old.requires_grad)


def _set_width(module: nn.Module, *, outputs: int | None = None, inputs: int | None = None) -> None:
    """The sizes that a layer states."""
    names = ("out_channels", "in_channels") if isinstance(module, nn.Conv2d) else ("out_features", "in_features")
    for name, size in zip(names, (outputs, inputs), strict=True):
        if size is not None:
            setattr(module, name, size)
