"""Give a causal language model exits after some of its blocks."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn

from layerwright.core.blocks import find_blocks
from layerwright.core.errors import InputError
from layerwright.core.layers import structure_copy
from layerwright.nn.exits import ExitModel, ExitNorm

__all__ = ["add_exits", "exit_positions"]


def add_exits(
    model: nn.Module,
    every: int | None = None,
    *,
    positions: Sequence[int] | None = None,
    norm: ExitNorm = "shared",
) -> ExitModel:
    """A model with exits every `every` blocks, or after the blocks number `positions` (Yu et al., 2024, EDGE-LLM).

    Each exit has a copy of the model's output layer, so that exits can be trained apart, and that of a tied layer leaves
    the embedding alone. The released code of the paper leaves the final norm out at early exits (``norm="none"``); here
    it is shared by all, which makes an untrained exit usable.

    Args:
        model: any causal language model of transformers; it shares its tensors with the result and is left as it is.
        every: blocks between exits; the last block always gets one.
        positions: instead of that, numbers from 1 to the number of blocks.
        norm: ``shared`` or ``none``.

    Warns:
        UserWarning: `every` does not divide the number of blocks.

    Raises:
        InputError: encoder-decoder or no language model, no list of blocks, or positions outside 1 to its length.
    """
    config: Any = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{type(model).__name__} is an encoder-decoder model; exits are for decoders alone")
    if norm not in ("shared", "none"):
        raise InputError(f"norm: got {norm!r}, expected 'shared' or 'none'")
    stacks = find_blocks(model)
    find_head = getattr(model, "get_output_embeddings", None)
    head = find_head() if callable(find_head) else None
    if head is None or len(stacks) != 1 or not isinstance(model, nn.Module):
        raise InputError(
            f"{type(model).__name__}: exits need a causal language model with one stack of blocks and an output layer"
        )
    names = stacks[0].names
    places = exit_positions(len(names), every, positions)
    copy = structure_copy(model)
    path = next(name for name, module in model.named_modules() if module is head)
    return ExitModel(copy, names, places, path, norm).train(model.training)


def exit_positions(depth: int, every: int | None = None, positions: Sequence[int] | None = None) -> tuple[int, ...]:
    """Exits of a stack of `depth` blocks, ascending.

    Warns:
        UserWarning: `every` does not divide `depth`.

    Raises:
        InputError: both or neither is given, or a number outside 1 to `depth`.
    """
    if (every is None) == (positions is None):
        raise InputError("exits: give either every= or positions=")
    if positions is not None:
        bad = [p for p in positions if isinstance(p, bool) or not isinstance(p, int) or not 1 <= p <= depth]
        if bad or not positions:
            raise InputError(f"positions: got {list(positions)}, expected numbers from 1 to {depth}")
        return tuple(sorted(set(positions)))
    assert every is not None
    if not 1 <= every <= depth:
        raise InputError(f"every: got {every}, expected 1 to the {depth} blocks")
    if depth % every:
        warnings.warn(
            f"every: {every} does not divide the {depth} blocks; the last {depth % every} make a shorter window",
            UserWarning,
            stacklevel=3,
        )
    return tuple(sorted({*range(every, depth + 1, every), depth}))
