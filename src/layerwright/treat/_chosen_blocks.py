"""Blocks that a user named, by path or by index."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from layerwright.core.blocks import find_blocks
from layerwright.core.errors import InputError, unknown_name

__all__ = ["chosen_blocks"]


def chosen_blocks(model: nn.Module, blocks: str | Sequence[str] | Sequence[int] | None) -> tuple[str, ...]:
    """Paths of the named blocks of `model` in order of execution; None for all.

    Raises:
        TypeError: the model has no blocks.
        InputError: none is named, or one that is not there.
    """
    try:
        names = [name for stack in find_blocks(model) for name in stack.names]
    except InputError as error:
        raise TypeError(f"model: {error}") from error
    if blocks is None:
        return tuple(names)
    if isinstance(blocks, str) or not len(blocks):
        raise InputError(f"blocks: got {blocks!r}, expected paths or indices of one block or more")
    found: set[str] = set()
    for block in blocks:
        if isinstance(block, int) and not isinstance(block, bool) and 0 <= block < len(names):
            found.add(names[block])
        elif block in names:
            found.add(str(block))
        else:
            raise unknown_name("block", str(block), names, "blocks")
    return tuple(name for name in names if name in found)
