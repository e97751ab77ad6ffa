"""Change the lists that hold blocks, and let the configuration follow."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TypeVar

from torch import nn

from layerwright.core.blocks import Blocks
from layerwright.core.errors import InputError
from layerwright.core.layers import structure_copy
from layerwright.treat._depth import Arranged, align_cache, arrange_configs, set_depth
from layerwright.treat._rebuilt import INDEX_NAMES, Difference, compare, rebuild
from layerwright.treat._tables import movable, move_tables_, owned_tables, remove_tables_

__all__: list[str] = []

M = TypeVar("M", bound=nn.Module)


def arrange_lists_(
    model: nn.Module, arranged: Sequence[Arranged], *, share: bool, move_tables: bool
) -> tuple[dict[str, str], dict[str, str]]:
    """Put the blocks of every stack in their new order, numbered anew.

    Returns:
        Old to new path of the children of these lists that stayed themselves, and new path of every copy to the old
        path of its block.
    """
    moved: dict[str, str] = {}
    copies: dict[str, str] = {}
    for item in arranged:
        if move_tables:
            move_tables_(model, item)
        own, made = _arrange_(model, item, share)
        moved |= own
        copies |= made
    return moved, copies


def _arrange_(model: nn.Module, item: Arranged, share: bool) -> tuple[dict[str, str], dict[str, str]]:
    stack = item.stack
    container = model.get_submodule(stack.path)
    prefix = f"{stack.path}." if stack.path else ""
    index_of = {name: index for index, name in enumerate(stack.names)}
    numbered = all(name.isdigit() for name in container._modules)
    places = _places([(name, index_of.get(prefix + name)) for name in container._modules], item)
    children = dict(container._modules)
    tables = {
        stack.names[index]: [
            name
            for name in owned_tables(model, item, index, tuple(i for i in item.order if i != index))
            if movable(model.get_submodule(stack.names[index]), name)
        ]
        for index in item.copied
    }
    container._modules.clear()
    moved: dict[str, str] = {}
    copies: dict[str, str] = {}
    renumbered: list[tuple[nn.Module, int, int]] = []
    for position, (name, new_index) in enumerate(places):
        child = children[name]
        again = prefix + name in moved
        new = str(position) if numbered else name
        if again and child is not None:
            child = structure_copy(child) if share else copy.deepcopy(child)
            remove_tables_(child, tables.get(prefix + name, []))
        container._modules[new] = child
        (copies if again else moved).update({prefix + new: prefix + name} if again else {prefix + name: prefix + new})
        if new_index is not None and child is not None:
            renumbered.append((child, index_of[prefix + name], new_index))
    seen: set[int] = set()
    for block, old_index, index in renumbered:  # behind all copying: a copy begins with the old index
        _renumber_(block, old_index, index, seen)
    return moved, copies


def _places(children: Sequence[tuple[str, int | None]], item: Arranged) -> list[tuple[str, int | None]]:
    """Name of the child at each new place of the list, and the new index of the block where it is one.

    Children that are no blocks stay where they stand between the blocks; `problems` refuses an order for which that
    means nothing.
    """
    names = {index: name for name, index in children if index is not None}
    if len(names) == len(children):
        return [(names[old], new) for new, old in enumerate(item.order)]
    found: list[tuple[str, int | None]] = []
    count = 0
    for name, index in children:
        if index is None:
            found.append((name, None))
            continue
        for _ in range(item.order.count(index)):
            found.append((name, count))
            count += 1
    return found


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


def follow(
    model: nn.Module, trial: M, stacks: Sequence[Blocks], arranged: Sequence[Arranged], *, move_tables: bool
) -> tuple[M, bool, Difference]:
    """Change the configurations; returns the changed model, whether every list was sliced, and what still differs.

    First only what is called so is taken for a per-layer list. If the model that this configuration builds is not the
    one at hand, every list as long as the stack was deep is tried.
    """
    nothing = Difference((), (), ())
    try:
        expected = rebuild(model)
    except InputError:  # nothing to compare with: the depth is written where it is found
        follow_(trial, stacks, arranged, False)
        return trial, False, nothing
    arrange_lists_(expected, arranged, share=False, move_tables=move_tables)
    paths = [item.stack.path for item in arranged]
    results: list[tuple[M, bool, Difference]] = []
    failure: InputError | None = None
    for every_list in (False, True):
        candidate = structure_copy(trial)
        follow_(candidate, stacks, arranged, every_list)
        try:
            difference = compare(expected, rebuild(candidate), paths)
        except InputError as error:
            failure = failure or error
            continue
        results.append((candidate, every_list, difference))
        if difference == nothing:
            break
    if not results:
        raise InputError(f"blocks: in the new order, {failure}; skip_blocks works") from failure
    return min(results, key=lambda result: (len(result[2].outside), len(result[2].inside)))


def follow_(model: nn.Module, stacks: Sequence[Blocks], arranged: Sequence[Arranged], every_list: bool) -> None:
    """Write the new depths into the configurations and modules of `model`."""
    for item in arranged:
        stages = [stack for stack in stacks if stack.group == item.stack.group and stack.role == "stage"]
        stage = stages.index(item.stack) if item.stack in stages else 0
        arrange_configs(model, item, stage=stage, every_list=every_list)
        set_depth(model, item)
    decoders = [stack for stack in stacks if stack.role == "decoder"]
    if len(decoders) == 1:
        depth = next((len(item.order) for item in arranged if item.stack == decoders[0]), len(decoders[0]))
        align_cache(model, depth)
