"""Blocks in a new order: some dropped, some in several places; everything that states the depth follows."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from torch import nn

from layerwright.core.blocks import Blocks, find_blocks
from layerwright.core.errors import CheckError, InputError, unknown_name
from layerwright.core.layers import structure_copy
from layerwright.treat._arranged import arrange_lists_, follow, follow_
from layerwright.treat._depth import Arranged
from layerwright.treat._movable import problems
from layerwright.treat._rebuilt import Difference

__all__ = ["BlockMap", "arrange_blocks", "arranged_stacks"]

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class BlockMap:
    """Where everything went when blocks were dropped or copied.

    Attributes:
        moved: old to new path of every child of the changed lists that stayed itself.
        dropped: old paths of the dropped blocks.
        copies: new path of every copy to the old path of the block it was made from.
        notes: what a model that is built anew from the changed configuration would do otherwise than this one.
    """

    moved: Mapping[str, str] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    copies: Mapping[str, str] = field(default_factory=dict)
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

    def new_paths(self, path: str) -> tuple[str, ...]:
        """The new paths of `path`: itself and its copies; none if it was dropped."""
        first = self.new_path(path)
        prefixes = [(new, old) for new, old in self.copies.items() if path == old or path.startswith(old + ".")]
        return (*(() if first is None else (first,)), *(new + path[len(old) :] for new, old in prefixes))


def arrange_blocks(
    model: M,
    order: Sequence[int] | Mapping[str, Sequence[int]],
    *,
    share: bool = False,
    copy: bool = True,
    move_tables: bool = False,
    blocks: str | Sequence[str] | None = None,
) -> tuple[M, BlockMap]:
    """Put the blocks of `model` in a new order, in which a block may be left out or stand more than once.

    ``[0, 1, 1, 2]`` runs the second block twice, ``[0, 2]`` drops it. What states the depth follows: the index in the
    cache that attention layers hold, the number of layers in the configuration, its per-layer lists (`layer_types`),
    nested configurations, stage depths. Generation with a cache, saving and loading work as before. Where the changed
    configuration cannot say what the blocks do (say, every second one shifts its windows), the model itself stays
    right, and `BlockMap.notes` and a warning tell what a reload would change. Works on the meta device.

    The first place of a block keeps the block itself. Every other place gets a copy, with its own index in the cache,
    that has tensors of its own, or with `share` the same parameters (what trains one, trains all; a saved model holds
    them once for each place). Memory: the tensors of the copies, unless shared.

    Args:
        model: any model with blocks.
        order: old index of each block after, for a model with one stack; or by stack, which is named by its path or
            by its role (``encoder``, ``decoder``), those left out staying as they are.
        share: let copies use the parameters of the block they were made from.
        copy: leave `model` alone and return a copy that shares the tensors of the kept blocks. False changes `model`.
        move_tables: where the first block owns a table that the others use (the position bias of T5), give it to the
            block that is first now, so that the old one can be dropped.
        blocks: as `override` of `layerwright.core.blocks.find_blocks`.

    Returns:
        The changed model and where its blocks went.

    Raises:
        InputError: an unknown stack; an index that is not there; nothing left; a block that changes the shape of its
            input; a block whose position table or keys and values later blocks use; a model whose other weights depend
            on its depth.
    """
    stacks = find_blocks(model, blocks)
    return apply_order(model, stacks, arranged_stacks(stacks, order), share=share, copy=copy, move_tables=move_tables)


def apply_order(
    model: M,
    stacks: Sequence[Blocks],
    arranged: Sequence[Arranged],
    *,
    share: bool = False,
    copy: bool = True,
    move_tables: bool = False,
) -> tuple[M, BlockMap]:
    """`arrange_blocks` for stacks that were found already; those whose order is the old one are left alone."""
    arranged = [item for item in arranged if item.order != tuple(range(item.before))]
    if not arranged:
        return (structure_copy(model) if copy else model), BlockMap()
    adapter = next((name for name, module in model.named_modules() if hasattr(module, "lora_A")), None)
    if adapter is not None:
        raise InputError(
            f"blocks: {adapter or 'the model'} carries an adapter, which belongs to the blocks as they are; merge it first "
            "(merge_and_unload), or change the blocks of the plain model and adapt it then"
        )
    found = problems(model, stacks, arranged, move_tables=move_tables)
    if found:
        raise CheckError(found)
    trial = structure_copy(model)
    moved, copies = arrange_lists_(trial, arranged, share=share, move_tables=move_tables)
    result, every_list, difference = follow(model, trial, stacks, arranged, move_tables=move_tables)
    if difference.outside:
        raise InputError(
            f"{type(model).__name__} has weights outside its blocks that depend on its depth "
            f"({'; '.join(difference.outside[:3])}); its blocks cannot be dropped or copied, skip_blocks works"
        )
    if not copy:
        result = model
        arrange_lists_(model, arranged, share=share, move_tables=move_tables)
        follow_(model, stacks, arranged, every_list)
    _set_attributes(result, difference)
    dropped = tuple(item.stack.names[index] for item in arranged for index in item.dropped)
    if difference.inside:
        warnings.warn(
            f"{type(model).__name__} with these blocks is right in memory, but built anew from its configuration "
            f"it would differ ({'; '.join(difference.inside[:3])}): build the original model, change its blocks in the "
            "same way, then load the weights",
            stacklevel=3,
        )
    return result, BlockMap(moved, dropped, copies, difference.inside)


def arranged_stacks(
    stacks: Sequence[Blocks], order: Sequence[int] | Mapping[str, Sequence[int]], argument: str = "order"
) -> list[Arranged]:
    """The stacks that `order` speaks of, each with its new order.

    Raises:
        InputError: as `arrange_blocks`; the message begins with `argument`.
    """
    if not isinstance(order, Mapping):
        if len(stacks) != 1:
            paths = ", ".join(stack.path or "the model" for stack in stacks)
            raise InputError(f"{argument}: this model has {len(stacks)} stacks ({paths}); say which: {{path: indices}}")
        order = {stacks[0].path: order}
    named = {stack.path: stack for stack in stacks}
    roles = [stack.role for stack in stacks]
    named |= {stack.role: stack for stack in stacks if roles.count(stack.role) == 1 and stack.role not in named}
    found: dict[str, Arranged] = {}
    for name, indices in order.items():
        if name not in named:
            raise unknown_name("stack", str(name), named, argument)
        stack = named[name]
        if stack.path in found:
            raise InputError(f"{argument}: {name} and another name mean the same stack {stack.path}; name it once")
        found[stack.path] = Arranged(stack, _indices(stack, indices, f"{argument}: {name or 'the model'}"))
    return list(found.values())


def _indices(stack: Blocks, indices: object, where: str) -> tuple[int, ...]:
    if isinstance(indices, str) or not isinstance(indices, (Sequence, range)):
        raise InputError(f"{where}: got {indices!r}, expected a list of block indices such as [0, 1, 1, 2]")
    for index in indices:
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(stack):
            raise InputError(f"{where}: got block {index!r}, expected whole numbers from 0 to {len(stack) - 1}")
    if not indices:
        raise InputError(f"{where}: no block is left; leave one at least")
    return tuple(indices)


def _set_attributes(model: nn.Module, difference: Difference) -> None:
    """Set what modules outside the blocks derive from the depth, where they still hold the old value."""
    for path, name, before, after in difference.attributes:
        module = model.get_submodule(path)
        if vars(module).get(name) == before:
            setattr(module, name, after)
