"""Check paths of blocks that a user chose: they are there, and none stands in another."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from layerwright.core.errors import InputError, unknown_name
from layerwright.core.layers import tensor_key

__all__ = ["check_block_paths", "inside_any"]


def check_block_paths(blocks: Sequence[str], model: nn.Module | None = None) -> tuple[str, ...]:
    """`blocks` as a tuple, none twice, none inside another and, where `model` is given, each a module of it.

    Raises:
        InputError: otherwise, or a single text; also where a block shares a weight with what is outside of it.
    """
    if isinstance(blocks, str):
        raise InputError(f"blocks: got the text {blocks!r}, expected a list of paths: [{blocks!r}]")
    paths = tuple(blocks)
    for path in paths:
        if not isinstance(path, str) or not path:
            raise InputError(f"blocks: got {path!r}, expected the path of a module inside the model")
        if paths.count(path) > 1:
            raise InputError(f"blocks: {path} comes twice; name each block once")
        outer = next((other for other in paths if path.startswith(other + ".")), None)
        if outer is not None:
            raise InputError(f"blocks: {path} stands inside {outer}, so they overlap; name one of them")
    if model is not None:
        modules = dict(model.named_modules(remove_duplicate=False))
        for path in paths:
            if path not in modules:
                raise unknown_name("path", path, modules, "blocks")
        _refuse_shared(model, paths)
    return paths


def inside_any(path: str, blocks: Sequence[str]) -> bool:
    """Whether `path` is one of `blocks` or inside of one."""
    return any(path == block or path.startswith(block + ".") for block in blocks)


def _refuse_shared(model: nn.Module, paths: Sequence[str]) -> None:
    """Raise `InputError` if training one of the blocks would change another module."""
    owners: dict[object, tuple[str, str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        block = next((path for path in paths if name.startswith(path + ".")), "")
        known, first = owners.setdefault(tensor_key(parameter), (block, name))
        if known != block:
            raise InputError(f"blocks: {first} and {name} are one weight, so {block or known} is no unit of its own")
