"""ListOps: nested prefix expressions of digits, whose value is a digit (Nangia and Bowman, 2018)."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from layerwright.core.errors import InputError

__all__ = ["CLASSES", "OPERATORS", "VOCABULARY", "expression", "listops"]

CLASSES = 10
PADDING, CLOSE, _DIGIT = 0, 1, 2
OPERATORS: Mapping[str, Callable[[Sequence[int]], int]] = MappingProxyType(
    {
        "MAX": max,
        "MIN": min,
        "MED": lambda values: sorted(values)[(len(values) - 1) // 2],
        "SM": lambda values: sum(values) % 10,
    }
)
"""What an operator makes of its arguments; of an even number the median is the lower one."""
_FIRST = _DIGIT + 10
_RULES = tuple(OPERATORS.values())
VOCABULARY = _FIRST + len(_RULES)
_NESTED = 0.3


def expression(draw: random.Random, max_depth: int, max_length: int, max_arguments: int) -> tuple[list[int], int]:
    """Tokens of a random expression, and its value.

    ``[OP arguments ]`` takes a token for the operator and its bracket, and one for the closing bracket. An argument is a
    further expression with probability 0.3 where depth and length allow it.
    """
    rule = draw.randrange(len(_RULES))
    tokens, values = [_FIRST + rule], []
    wanted = draw.randint(2, max_arguments)
    for number in range(wanted):
        # The bracket, and a digit for each argument after this one, must still fit.
        room = max_length - len(tokens) - 1 - (wanted - number - 1)
        if room < 1:
            break
        if max_depth > 1 and room >= 2 + max_arguments and draw.random() < _NESTED:
            inner, value = expression(draw, max_depth - 1, room, max_arguments)
        else:
            value = draw.randrange(10)
            inner = [_DIGIT + value]
        tokens += inner
        values.append(value)
    return [*tokens, CLOSE], _RULES[rule](values)


def listops(
    count: int, *, max_depth: int = 4, max_length: int = 128, max_arguments: int = 5, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """`count` expressions as ids ``(count, max_length)``, 0 for padding, and their values ``(count,)``.

    Half of them at least hold a further expression, so that no single list makes up the data.

    Raises:
        InputError: a number outside its range.
    """
    for name, value, low in (
        ("count", count, 1), ("max_depth", max_depth, 1), ("max_arguments", max_arguments, 2),
        ("max_length", max_length, max_arguments + 2),
    ):  # fmt: skip
        if value < low:
            raise InputError(f"{name}: got {value}, expected at least {low}")
    draw = random.Random(seed)
    ids, values = torch.zeros(count, max_length, dtype=torch.long), []
    for row in range(count):
        tokens, value = expression(draw, max_depth, max_length, max_arguments)
        while row % 2 and max_depth > 1 and max_length > 2 * max_arguments + 4 and sum(t >= _FIRST for t in tokens) < 2:
            tokens, value = expression(draw, max_depth, max_length, max_arguments)
        ids[row, : len(tokens)] = torch.tensor(tokens)
        values.append(value)
    return ids, torch.tensor(values)
