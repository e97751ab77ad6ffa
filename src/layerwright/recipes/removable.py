"""Which blocks a plan may remove, known before anything is scored."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from dataclasses import replace

from torch import nn

from layerwright.core.blocks import Blocks
from layerwright.core.errors import BudgetError, InputError
from layerwright.core.option import Scores
from layerwright.treat.drop import drop_blocks

__all__ = ["COUNTS_PLACES", "leave_one", "refuse_empty", "removable"]

COUNTS_PLACES = ("one_shot",)
"""Allocators that protect blocks by their places: these must be offered every block, and are checked afterwards."""


def removable(model: nn.Module, blocks: Sequence[Blocks]) -> tuple[str, ...]:
    """Paths of the blocks that can go, each taken alone: not the only one of its stack, none that changes the shape of
    its input, none whose tables, keys or values the later ones need.

    Names and shapes are looked at only; `model` is left alone. Cost: one structure copy for each block.
    """
    found = []
    for name in (name for stack in blocks for name in stack.names):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nothing is kept of the shorter model
            try:
                drop_blocks(model, [name])
            except InputError:
                continue
        found.append(name)
    return tuple(found)


def leave_one(scores: Scores, blocks: Sequence[Blocks]) -> Scores:
    """`scores` of removal without the block of greatest damage in each stack whose every block could go: no choice of
    the others then empties the stack.
    """
    kept = dict(scores.sensitivities)
    for stack in blocks:
        if all(name in kept for name in stack.names):
            kept.pop(max(stack.names, key=lambda name: kept[name]))
    return replace(scores, sensitivities=kept)


def refuse_empty(dropped: Collection[str], blocks: Sequence[Blocks], budget: object) -> None:
    """Refuse a choice that leaves nothing of a stack.

    Raises:
        BudgetError: naming the stack.
    """
    for stack in blocks:
        if all(name in dropped for name in stack.names):
            raise BudgetError(
                f"budget: {budget} would take all {len(stack)} blocks of {stack.path or 'the model'}; raise the budget, "
                "protect some blocks, or offer other treatments"
            )
