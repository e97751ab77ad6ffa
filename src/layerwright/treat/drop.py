"""Drop blocks for good, or skip them for a while."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TypeVar

from torch import nn

from layerwright.core.blocks import find_blocks
from layerwright.core.errors import InputError
from layerwright.core.skip import check_names, skip_blocks
from layerwright.treat._depth import Arranged
from layerwright.treat.arrange import BlockMap, apply_order, arranged_stacks

__all__ = ["drop_blocks", "keep_blocks", "skip_blocks"]

M = TypeVar("M", bound=nn.Module)


def drop_blocks(
    model: M,
    drop: Iterable[str],
    copy: bool = True,
    blocks: str | Sequence[str] | None = None,
    move_tables: bool = False,
) -> tuple[M, BlockMap]:
    """Remove blocks: the input of each passes on unchanged, and the blocks behind it move up.

    See `layerwright.treat.arrange.arrange_blocks` for what follows the new depth. Works on the meta device. Memory:
    none for tensors.

    Args:
        model: any model with blocks.
        drop: paths of the blocks to drop; none is fine.
        copy: leave `model` alone and return a copy that shares the tensors of the kept blocks. False changes `model`.
        blocks: as `override` of `layerwright.core.blocks.find_blocks`.
        move_tables: as in `arrange_blocks`.

    Returns:
        The shorter model and where the remaining blocks went.

    Raises:
        InputError: not a block; a whole stack; a block that changes the shape of its input; a block whose position
            table or keys and values later blocks use; a model whose other weights depend on its depth.
    """
    stacks = find_blocks(model, blocks)
    wanted = check_names(drop, stacks)
    arranged = [
        Arranged(stack, tuple(index for index, name in enumerate(stack.names) if name not in wanted))
        for stack in stacks
    ]
    return apply_order(model, stacks, arranged, copy=copy, move_tables=move_tables)


def keep_blocks(
    model: M,
    keep: Sequence[int] | Mapping[str, Sequence[int]],
    copy: bool = True,
    blocks: str | Sequence[str] | None = None,
    move_tables: bool = False,
) -> tuple[M, BlockMap]:
    """Keep the listed blocks and drop the others; see `drop_blocks`.

    Args:
        model: any model with blocks.
        keep: ascending indices for a model with one stack, or by stack (its path, or its role such as ``encoder``).
        copy, blocks, move_tables: see `drop_blocks`.

    Raises:
        InputError: as `drop_blocks`; an index that is not there, given twice or out of order; no index at all.
    """
    stacks = find_blocks(model, blocks)
    arranged = arranged_stacks(stacks, keep, "keep")
    for item in arranged:
        if any(a >= b for a, b in pairwise(item.order)):
            raise InputError(
                f"keep: {item.stack.path}: got {list(item.order)}, expected each index once, in ascending order "
                "(arrange_blocks takes any order)"
            )
    return apply_order(model, stacks, arranged, copy=copy, move_tables=move_tables)
