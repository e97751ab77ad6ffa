"""Which blocks can be dropped or copied: those that hand on what they were given, and give nothing else to later ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.pooling import _AvgPoolNd, _MaxPoolNd

from layerwright.core.blocks import Blocks
from layerwright.core.layer import LayerRef
from layerwright.core.layers import list_layers
from layerwright.treat._depth import Arranged
from layerwright.treat._tables import movable, owned_tables

__all__: list[str] = []


def problems(
    model: nn.Module, stacks: Sequence[Blocks], arranged: Sequence[Arranged], *, move_tables: bool = False
) -> list[str]:
    """Everything that speaks against these orders of blocks."""
    refs = list_layers(model, stacks)
    found: list[str] = []
    for item in arranged:
        what = "copy" if item.copied else "drop"
        reason = _no_list(model, item)
        if reason:
            found.append(f"{what}: {reason}")
            continue
        streams = _streams(model, refs, item.stack)
        rest = tuple(sorted(set(item.order)))
        for index in item.dropped:
            reason = _changes_shape(streams, index)
            reason = reason or _owns_table(model, item, index, rest, move_tables) or _feeds_others(model, item, index)
            if reason:
                found.append(f"drop: {item.stack.names[index]} {reason}")
        for index in item.copied:
            others = tuple(i for i in rest if i != index)
            reason = _changes_shape(streams, index)
            reason = reason or _owns_table(model, item, index, others, move=True) or _shares(model, item, index)
            if reason:
                found.append(f"copy: {item.stack.names[index]} {reason}")
    return found


def _no_list(model: nn.Module, item: Arranged) -> str:
    """Why the list itself cannot be arranged so, ``""`` if it can."""
    stack = item.stack
    if not item.order:
        return f"all {item.before} blocks of {stack.path or 'the model'}; leave one at least"
    container = model.get_submodule(stack.path)
    children = {f"{stack.path}.{name}" if stack.path else name for name in container._modules}
    if not isinstance(container, (nn.ModuleList, nn.Sequential, nn.ModuleDict)) or not children.issuperset(stack):
        return (
            f"{', '.join(stack.names[:3])} do not stand in one list; only blocks of a ModuleList, Sequential "
            "or ModuleDict can be dropped or copied"
        )
    if len(set(map(id, container.children()))) < len(container._modules):
        return f"{stack.path or 'the model'} holds one block in several places; give each its own"
    if item.copied and not all(name.isdigit() for name in container._modules):
        return f"the children of {stack.path or 'the model'} have names of their own; a copy would have none"
    if list(item.order) != sorted(item.order) and len(children) > len(stack):
        return f"{stack.path or 'the model'} also holds layers between its blocks; keep the blocks in their order"
    return ""


@dataclass(frozen=True)
class _Stream:
    """What can be told about the shapes that go into a block and come out of it.

    Attributes:
        attends: it mixes tokens, so that its first weight need not take its input.
        entry: width of its input: of the query projection, or of the first weight where it does not attend.
        exit: width of the last weight where it does not attend.
        strided: a convolution or a pooling in it steps by more than 1.
        shapes: of all its parameters.
    """

    attends: bool
    entry: int | None
    exit: int | None
    strided: bool
    shapes: Mapping[str, tuple[int, ...]]


def _streams(model: nn.Module, refs: Sequence[LayerRef], stack: Blocks) -> list[_Stream]:
    inside: list[list[LayerRef]] = [[] for _ in stack.names]
    for ref in refs:
        if ref.stack == stack.path and ref.block is not None:
            inside[ref.block].append(ref)
    streams = []
    for module, own in zip(stack.modules(model), inside, strict=True):
        shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
        if any(ref.kind == "attention" for ref in own):
            query = next((ref.shape[1] for ref in own if ref.role in ("q", "qkv")), None)
            streams.append(_Stream(True, query, None, _strides(module), shapes))
            continue
        weights = [ref for ref in own if ref.kind in ("linear", "conv")]
        first = model.get_submodule(weights[0].path) if weights else None
        entry = first.in_channels if isinstance(first, _ConvNd) else weights[0].shape[1] if weights else None
        streams.append(_Stream(False, entry, weights[-1].shape[0] if weights else None, _strides(module), shapes))
    return streams


def _changes_shape(streams: Sequence[_Stream], index: int) -> str:
    """Why the input and the output of a block differ in shape, ``""`` if nothing says so."""
    block = streams[index]
    if block.strided and not (block.attends and all(other.strided for other in streams)):
        return "changes the resolution of its input (stride above 1), so that later layers need it"
    if index + 1 < len(streams):
        after = streams[index + 1].entry if streams[index + 1].attends == block.attends else None
    else:
        after = block.exit if all(block.shapes != other.shapes for other in streams[:-1]) else None
    if block.entry is not None and after is not None and block.entry != after:
        return f"changes the width of its input from {block.entry} to {after}, so that later layers need it"
    return ""


def _strides(module: nn.Module) -> bool:
    pools = (_MaxPoolNd, _AvgPoolNd)
    steps: list[Any] = [m.stride for m in module.modules() if isinstance(m, (_ConvNd, *pools))]
    return any(step > 1 for s in steps for step in (s if isinstance(s, tuple) else (s,)))


def _owns_table(model: nn.Module, item: Arranged, index: int, others: tuple[int, ...], move: bool) -> str:
    """T5 computes the position bias in its first block and hands it on: no other block could."""
    block = item.stack.modules(model)[index]
    for name in owned_tables(model, item, index, others) if others else ():
        if not (move and movable(block, name)):
            advice = "; move_tables=True gives it to the next block" if movable(block, name) else ""
            return f"holds the table {name.rpartition('.')[2] or name} whose result the later blocks share{advice}"
    return ""


def _feeds_others(model: nn.Module, item: Arranged, index: int) -> str:
    """Blocks that reuse keys and values need the block that stores them."""
    modules = item.stack.modules(model)
    stored = _flagged(modules[index], ("store",))
    reused = {kind for i in item.order for kind in _flagged(modules[i], ("shared", "reuse"))}
    return "stores the keys and values that later blocks reuse" if stored & reused else ""


def _shares(model: nn.Module, item: Arranged, index: int) -> str:
    """A copy of a block that stores or reuses keys and values would do so in the wrong place."""
    flagged = _flagged(item.stack.modules(model)[index], ("store", "shared", "reuse"))
    return "shares keys and values with other blocks, and a copy would not know with which" if flagged else ""


def _flagged(block: nn.Module, words: tuple[str, ...]) -> set[str]:
    """Attention types of the modules in a block with a true flag such as ``store_full_length_kv``."""
    found = set()
    for module in block.modules():
        flags = (name for name, value in vars(module).items() if value is True and "kv" in name)
        if any(word in name for name in flags for word in words):
            found.add(str(vars(module).get("layer_type", "")))
    return found
