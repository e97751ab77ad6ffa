"""List every layer of a model with its address, shape and role; count what it stores; copy its structure."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from torch import Tensor, nn

from layerwright.core._anatomy import Parts, dissect
from layerwright.core._leaves import Leaf, leaves
from layerwright.core.blocks import Blocks, find_blocks, tower
from layerwright.core.errors import InputError
from layerwright.core.layer import Kind, LayerRef

__all__ = [
    "list_layers",
    "owned_parameters",
    "parameter_bytes",
    "saved_tensors",
    "structure_copy",
    "tensor_key",
    "treatable",
]

_SMALLEST_SIDE = 8

Place = tuple[str, int | None]
M = TypeVar("M", bound=nn.Module)


def tensor_key(tensor: Tensor) -> tuple[int, int, tuple[int, ...], tuple[int, ...]]:
    """Equal for two tensors exactly if they are the same part of the same storage (tied weights), on any device."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride()


def saved_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """``(name, tensor)`` of every parameter and every saved buffer, tied ones once, under their first name."""
    seen = set()
    for path, module in model.named_modules():
        temporary = module._non_persistent_buffers_set
        buffers = ((name, b) for name, b in module._buffers.items() if name not in temporary)
        for name, tensor in (*module._parameters.items(), *buffers):
            if tensor is None or (key := tensor_key(tensor)) in seen:
                continue
            seen.add(key)
            yield f"{path}.{name}" if path else name, tensor


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and saved buffers of `model`, tied tensors counted once; exact on the meta device too."""
    return sum(tensor.numel() * tensor.element_size() for _, tensor in saved_tensors(model))


def structure_copy(model: M) -> M:
    """A deep copy of the modules, settings and hooks of `model` that shares every parameter and buffer with it.

    Removing, adding or replacing modules, parameters and buffers of the copy leaves `model` alone; writing *into* a
    shared tensor (training, statistics of a batch norm in training mode) changes both. Costs no tensor memory.
    """
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def list_layers(model: nn.Module, blocks: Sequence[Blocks] | None = None) -> tuple[LayerRef, ...]:
    """Every layer of `model`, in order of registration; a block, an attention and an mlp before the layers in them.

    Each parameter belongs to exactly one of the layers (see `owned_parameters`): to the layer made of the module
    that holds it, or, where that module is no known kind of layer, to an entry of its own (`experts`, `other`).
    A module that stands in two places is listed once; a weight that two layers share has its first layer as owner,
    and the others say so (`tied`). A block that is a single layer is listed as that layer, with its block index.
    Reads names and shapes only: works on the meta device.

    Args:
        model: any module.
        blocks: its stacks; None finds them, and a model without any is listed without.

    Raises:
        TypeError: `model` is not a module.
    """
    if blocks is None:
        try:
            blocks = find_blocks(model)
        except InputError:
            blocks = ()
    modules = dict(model.named_modules())
    places = _places(modules, blocks)
    found = {path: tuple(leaves(path, m, modules.get(_parent(path)))) for path, m in modules.items()}
    flat = [leaf for own in found.values() for leaf in own]
    parts = _parts(modules, flat, places, blocks)
    heads, stems = _heads(model, modules, flat, places), _stems(flat, places, blocks)
    owners: dict[object, str] = {}
    refs: list[LayerRef] = []
    for path, own in found.items():
        place, part = places[path], parts.get(places[path], Parts())
        container = _container(path, place, part, blocks)
        if container is not None and all(leaf.path != path for leaf in own):
            refs.append(LayerRef(path, container, stack=place[0], block=place[1]))
        for leaf in own:
            role = "stem" if leaf.path in stems else part.roles.get(leaf.path, "")
            if leaf.path in part.routers:
                role, leaf = "router", replace(leaf, kind="linear", layout="linear") if leaf.plain else leaf
            kind: Kind = "head" if leaf.path in heads else leaf.kind
            name = leaf.tensor if leaf.layout != "none" else ""
            tied = _owner(model, leaf, owners)
            refs.append(LayerRef(leaf.path, kind, name, leaf.shape, leaf.count, leaf.layout, *place, tied, role))
    return tuple(refs)


def owned_parameters(model: nn.Module, refs: Sequence[LayerRef] | None = None) -> dict[str, tuple[str, ...]]:
    """Full names of the parameters that belong to each layer itself (weight, bias), by path of the layer.

    Blocks and containers own none. A tied parameter is counted under its first name only, so that over all of
    `list_layers` every distinct parameter occurs exactly once.
    """
    refs = list_layers(model) if refs is None else refs
    modules = dict(model.named_modules())
    first = {name for name, _ in saved_tensors(model)}
    owned: dict[str, tuple[str, ...]] = {}
    for ref in refs:
        names: list[str] = []
        if ref.path not in modules or (ref.path == "" and ref.kind == "other"):
            names = [ref.path, f"{ref.path}_bias"]
        elif ref.kind not in ("block", "attention", "mlp"):
            names = [f"{ref.path}.{name}" if ref.path else name for name in modules[ref.path]._parameters]
        owned[ref.path] = tuple(name for name in names if name in first)
    return owned


def treatable(
    model: nn.Module,
    refs: Sequence[LayerRef] | None = None,
    *,
    include_head: bool = False,
    include_embeddings: bool = False,
) -> tuple[LayerRef, ...]:
    """The layers whose weights a treatment may change by default.

    Linear, convolution and expert weights, in blocks and outside, save: the head, embeddings, routers of mixtures of
    experts, the stem (patch embedding, first convolutions), weights with a side below 8, layers whose weight another
    layer owns, and layouts without matrices. A tied head is decided where its weight lives: `include_head` then takes
    the embedding that owns it.
    """
    refs = list_layers(model) if refs is None else tuple(refs)
    tied_heads = {ref.tied for ref in refs if ref.kind == "head" and ref.tied} if include_head else set()
    kinds = {"linear", "conv", "experts"}
    kinds |= ({"head"} if include_head else set()) | ({"embedding"} if include_embeddings else set())
    return tuple(
        ref
        for ref in refs
        if (ref.kind in kinds or ref.path in tied_heads)
        and ref.layout != "none"
        and not ref.tied
        and ref.role not in ("router", "stem")
        and min(ref.shape) >= _SMALLEST_SIDE
    )


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _places(modules: Mapping[str, nn.Module], blocks: Sequence[Blocks]) -> dict[str, Place]:
    """``(stack, block index)`` of every module, ``("", None)`` outside."""
    starts = {name: (stack.path, index) for stack in blocks for index, name in enumerate(stack.names)}
    places: dict[str, Place] = {}
    for path in modules:
        outer: Place = places[_parent(path)] if path else ("", None)
        places[path] = starts.get(path, outer)
    return places


def _place_of(leaf: Leaf, places: Mapping[str, Place]) -> Place:
    return places[leaf.path] if leaf.path in places else places[_parent(leaf.path)]


def _parts(
    modules: Mapping[str, nn.Module], flat: Sequence[Leaf], places: Mapping[str, Place], blocks: Sequence[Blocks]
) -> dict[Place, Parts]:
    """The parts of every block, by its place."""
    inside: dict[Place, list[Leaf]] = {}
    for leaf in flat:
        loose_projection = leaf.path.endswith("in_proj_weight")
        if leaf.kind in ("linear", "experts") or leaf.plain or loose_projection:
            inside.setdefault(_place_of(leaf, places), []).append(leaf)
    parts: dict[Place, Parts] = {}
    for stack in blocks:
        for index, name in enumerate(stack.names):
            own = inside.get((stack.path, index), [])
            counts = {leaf.path: leaf.count for leaf in own if leaf.kind == "experts"}
            parts[(stack.path, index)] = dissect(modules[name], name, {leaf.path: leaf.shape for leaf in own}, counts)
    return parts


def _container(path: str, place: Place, part: Parts, blocks: Sequence[Blocks]) -> Kind | None:
    if any(path in stack.names for stack in blocks if stack.path == place[0]):
        return "block"
    if path in part.attention:
        return "attention"
    return "mlp" if path in part.mlp else None


def _owner(model: nn.Module, leaf: Leaf, owners: dict[object, str]) -> str:
    """Path of the earlier layer that has the same weight, ``""`` if there is none."""
    if not leaf.tensor:
        return ""
    module, _, name = leaf.tensor.rpartition(".")
    first = owners.setdefault(tensor_key(getattr(model.get_submodule(module), name)), leaf.path)
    return "" if first == leaf.path else first


def _heads(
    model: nn.Module, modules: Mapping[str, nn.Module], flat: Sequence[Leaf], places: Mapping[str, Place]
) -> set[str]:
    """The output embedding the model names, or else its last matrix if that stands behind all blocks.

    Layers of equal width beside it, behind all blocks, are heads too (a classifier for distillation, projections of
    two towers).
    """
    linear = {leaf.path: leaf for leaf in flat if leaf.kind == "linear" and _place_of(leaf, places)[1] is None}
    behind = {leaf.path for leaf in flat[_end_of_blocks(flat, places) :]}
    named = _output_embedding(model)
    last = next((path for path, module in modules.items() if module is named), "") if named is not None else ""
    if last not in linear:
        bearing = [leaf.path for leaf in flat if leaf.shape != (0, 0)]
        last = bearing[-1] if len(bearing) > 1 and bearing[-1] in linear else ""
    if not last:
        return set()
    beside = (p for p in linear if _parent(p) == _parent(last) and linear[p].shape[0] == linear[last].shape[0])
    chained = isinstance(modules[_parent(last)], nn.Sequential)
    return {last} if chained else {last, *(p for p in beside if p in behind)}


def _end_of_blocks(flat: Sequence[Leaf], places: Mapping[str, Place]) -> int:
    """Position behind the last layer in a block; behind everything where there is no block."""
    inside = [position for position, leaf in enumerate(flat) if _place_of(leaf, places)[1] is not None]
    return inside[-1] + 1 if inside else len(flat)


def _output_embedding(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    try:
        found = getter() if callable(getter) else None
    except NotImplementedError:
        return None
    return found if isinstance(found, nn.Module) else None


def _stems(flat: Sequence[Leaf], places: Mapping[str, Place], blocks: Sequence[Blocks]) -> set[str]:
    """Convolutions before the first block of their tower, and the model's first weight if it is a convolution."""
    bearing = [leaf for leaf in flat if leaf.shape != (0, 0) and leaf.kind != "other"]
    stems = {leaf.path for leaf in bearing[:1] if leaf.kind == "conv"}
    for stack in blocks:
        root = tower(stack, blocks)
        for leaf in bearing:
            if root and not leaf.path.startswith(root + "."):
                continue
            if _place_of(leaf, places)[1] is not None:
                break
            if leaf.kind == "conv":
                stems.add(leaf.path)
    return stems
