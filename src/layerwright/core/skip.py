"""Skip blocks for a while: what is measured without them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn

from layerwright.core.blocks import Blocks, find_blocks
from layerwright.core.errors import InputError, unknown_name

__all__ = ["check_names", "skip_blocks"]

M = TypeVar("M", bound=nn.Module)


@contextmanager
def skip_blocks(model: M, paths: Iterable[str], blocks: str | Sequence[str] | None = None) -> Iterator[M]:
    """Within the context each of these blocks hands on its input; nothing is copied, and all is undone at the end.

    The blocks still run, so that caches stay complete and position tables are still computed: skipping is for
    measuring, `drop_blocks` is for saving time. Where blocks return more than hidden states, only those are replaced.

    Raises:
        InputError: not a block, or, when the model runs, a block that changes the shape of its input.
    """
    wanted = check_names(paths, find_blocks(model, blocks))
    modules = [model.get_submodule(path) for path in wanted]
    handles = [module.register_forward_hook(_pass_on, prepend=True, with_kwargs=True) for module in modules]
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


def _pass_on(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    hidden = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
    first = output[0] if isinstance(output, (tuple, list)) and len(output) else output
    if hidden is None or not isinstance(first, Tensor):
        raise InputError(f"skip: {type(module).__name__} returns a {type(output).__name__}, expected hidden states")
    if hidden.shape != first.shape:
        raise InputError(
            f"skip: {type(module).__name__} changes the shape {tuple(hidden.shape)} to {tuple(first.shape)}; "
            "such a block cannot be skipped"
        )
    return type(output)((hidden, *output[1:])) if isinstance(output, (tuple, list)) else hidden


def check_names(paths: Iterable[str], stacks: Sequence[Blocks]) -> set[str]:
    """`paths` as a set, each checked to be a block.

    Raises:
        InputError: a single text instead of a list, or a name that is no block's.
    """
    if isinstance(paths, str):
        raise InputError(f"drop: got the text {paths!r}, expected a list of block paths: [{paths!r}]")
    wanted = set(paths)
    known = [name for stack in stacks for name in stack.names]
    for path in sorted(wanted.difference(known)):
        raise unknown_name("block", path, known)
    return wanted
