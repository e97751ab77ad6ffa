"""Drop blocks for good, or skip them for a while."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from torch import nn

from layerwright.core.blocks import Blocks, find_blocks
from layerwright.core.errors import CheckError, InputError
from layerwright.core.layers import structure_copy
from layerwright.core.skip import check_names, skip_blocks
from layerwright.treat._depth import Shrunk, align_cache, set_depth, shrink_configs
from layerwright.treat._droppable import problems
from layerwright.treat._rebuilt import INDEX_NAMES, Difference, compare, rebuild

__all__ = ["BlockMap", "drop_blocks", "skip_blocks"]

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class BlockMap:
    """Where everything went when blocks were dropped.

    Attributes:
        moved: old to new path of every child of the lists that lost blocks and stayed itself.
        dropped: old paths of the dropped blocks.
        notes: what a model that is built anew from the changed configuration would do otherwise than this one.
    """

    moved: Mapping[str, str] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def new_path(self, path: str) -> str | None:
        """The new path of a module or parameter called `path` before; None if it was dropped."""
        outer, rest = path, ""
        while outer:
            if outer in self.dropped:
                return None
            if outer in self.moved:
                return self.moved[outer] + rest
            outer, dot, last = outer.rpartition(".")
            rest = f"{dot}{last}{rest}" if dot else last
        return path


def drop_blocks(
    model: M, drop: Iterable[str], copy: bool = True, blocks: str | Sequence[str] | None = None
) -> tuple[M, BlockMap]:
    """Remove blocks: the input of each passes on unchanged, and the blocks behind it move up.

    Everything else that states the depth follows: the index in the cache that attention layers hold, the number of
    layers in the configuration, its per-layer lists (`layer_types`), nested configurations, stage depths. Generation
    with a cache, saving and loading work as before. Where the changed configuration cannot say what the remaining
    blocks do (say, every second block shifts its windows), the model itself stays right, and `BlockMap.notes` and a
    warning tell what a reload would change. Works on the meta device. Memory: none for tensors.

    Args:
        model: any model with blocks.
        drop: paths of the blocks to drop; none is fine.
        copy: leave `model` alone and return a copy that shares the tensors of the kept blocks. False changes `model`.
        blocks: as `override` of `layerwright.core.blocks.find_blocks`.

    Returns:
        The shorter model and where the remaining blocks went.

    Raises:
        InputError: not a block; a whole stack; a block that changes the shape of its input; a block whose position
            table or keys and values later blocks use; a model whose other weights depend on its depth.
    """
    stacks = find_blocks(model, blocks)
    wanted = check_names(drop, stacks)
    if not wanted:
        return (structure_copy(model) if copy else model), BlockMap()
    shrunk = [
        Shrunk(stack, tuple(index for index, name in enumerate(stack.names) if name not in wanted))
        for stack in stacks
        if wanted.intersection(stack.names)
    ]
    found = problems(model, stacks, shrunk)
    if found:
        raise CheckError(found)
    trial = structure_copy(model)
    moved = _shorten_all_(trial, shrunk)
    result, every_list, difference = _follow(model, trial, stacks, shrunk, moved)
    if difference.outside:
        raise InputError(
            f"drop: {type(model).__name__} has weights outside its blocks that depend on its depth "
            f"({'; '.join(difference.outside[:3])}); its blocks cannot be dropped, skip_blocks works"
        )
    if not copy:
        result = model
        _shorten_all_(model, shrunk)
        _shrink_all(model, stacks, shrunk, every_list)
    _set_attributes(result, difference)
    dropped = tuple(name for stack in stacks for name in stack.names if name in wanted)
    if difference.inside:
        warnings.warn(
            f"{type(model).__name__} without these blocks is right in memory, but built anew from its configuration "
            f"it would differ ({'; '.join(difference.inside[:3])}): build the original model, drop the same blocks, "
            "then load the weights",
            stacklevel=2,
        )
    return result, BlockMap(moved, dropped, difference.inside)


def _shorten_all_(model: nn.Module, shrunk: Sequence[Shrunk]) -> dict[str, str]:
    return {old: new for item in shrunk for old, new in _shorten_(model, item).items()}


def _shorten_(model: nn.Module, item: Shrunk) -> dict[str, str]:
    """Take the blocks out of their list, number the rest anew; returns old to new path of the list's children."""
    stack = item.stack
    container = model.get_submodule(stack.path)
    prefix = f"{stack.path}." if stack.path else ""
    gone = {name for index, name in enumerate(stack.names) if index not in item.keep}
    children = [(name, child) for name, child in container._modules.items() if prefix + name not in gone]
    numbered = all(name.isdigit() for name in container._modules)
    index_of = {name: index for index, name in enumerate(stack.names)}
    container._modules.clear()
    moved: dict[str, str] = {}
    for position, (name, child) in enumerate(children):
        new = str(position) if numbered else name
        container._modules[new] = child
        moved[prefix + name] = prefix + new
    seen: set[int] = set()
    for name, new in moved.items():
        if name in index_of:
            old_index = index_of[name]
            _renumber_(model.get_submodule(new), old_index, item.keep.index(old_index), seen)
    return moved


def _renumber_(block: nn.Module, old: int, new: int, seen: set[int]) -> None:
    """Attention layers address the cache by the index of their block."""
    for module in block.modules():
        if id(module) in seen:
            continue
        seen.add(id(module))
        for name in INDEX_NAMES:
            value = vars(module).get(name)
            first = 1 if name == "layer_number" and value == old + 1 else 0
            if type(value) is int and value == old + first:
                setattr(module, name, new + first)


def _follow(
    model: nn.Module, trial: M, stacks: Sequence[Blocks], shrunk: Sequence[Shrunk], moved: Mapping[str, str]
) -> tuple[M, bool, Difference]:
    """Change the configurations; returns the changed model, whether every list was sliced, and what still differs.

    First only what is called so is taken for a per-layer list. If the model that this configuration builds is not the
    one at hand, every list as long as the stack was deep is tried.
    """
    nothing = Difference((), (), ())
    try:
        before = rebuild(model)
    except InputError:  # nothing to compare with: the depth is written where it is found
        _shrink_all(trial, stacks, shrunk, False)
        return trial, False, nothing
    paths = [item.stack.path for item in shrunk]
    results: list[tuple[M, bool, Difference]] = []
    failure: InputError | None = None
    for every_list in (False, True):
        candidate = structure_copy(trial)
        _shrink_all(candidate, stacks, shrunk, every_list)
        try:
            difference = compare(before, rebuild(candidate), moved, paths)
        except InputError as error:
            failure = failure or error
            continue
        results.append((candidate, every_list, difference))
        if difference == nothing:
            break
    if not results:
        raise InputError(f"drop: with fewer blocks, {failure}; skip_blocks works") from failure
    return min(results, key=lambda result: (len(result[2].outside), len(result[2].inside)))


def _shrink_all(model: nn.Module, stacks: Sequence[Blocks], shrunk: Sequence[Shrunk], every_list: bool) -> None:
    for item in shrunk:
        stages = [stack for stack in stacks if stack.group == item.stack.group and stack.role == "stage"]
        stage = stages.index(item.stack) if item.stack in stages else 0
        shrink_configs(model, item, stage=stage, every_list=every_list)
        set_depth(model, item)
    decoders = [stack for stack in stacks if stack.role == "decoder"]
    if len(decoders) == 1:
        depth = next((len(item.keep) for item in shrunk if item.stack == decoders[0]), len(decoders[0]))
        align_cache(model, depth)


def _set_attributes(model: nn.Module, difference: Difference) -> None:
    """Set what modules outside the blocks derive from the depth, where they still hold the old value."""
    for path, name, before, after in difference.attributes:
        module = model.get_submodule(path)
        if vars(module).get(name) == before:
            setattr(module, name, after)
