"""How many labels of a transcript are wrong."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from layerwright.core.errors import InputError

__all__ = ["edit_distance", "token_error_rate"]


def edit_distance(a: Sequence[int], b: Sequence[int]) -> int:
    """Fewest insertions, deletions and replacements that turn `a` into `b` (Levenshtein, 1966).

    ``len(a)`` steps over arrays of ``len(b) + 1``.
    """
    target = np.asarray(b)
    places = np.arange(len(b) + 1)
    row = places.copy()
    for symbol in a:
        best = row + 1
        best[1:] = np.minimum(best[1:], row[:-1] + (target != symbol))
        # An insertion costs 1 for each place that it moves on.
        row = np.minimum.accumulate(best - places) + places
    return int(row[-1])


def token_error_rate(said: Sequence[Sequence[int]], true: Sequence[Sequence[int]]) -> float:
    """Edit distances as a share of all true labels, 0 or more.

    Raises:
        InputError: not as many transcripts, or no true label at all.
    """
    if len(said) != len(true):
        raise InputError(f"said, true: got {len(said)} and {len(true)} transcripts, expected as many")
    total = sum(len(own) for own in true)
    if not total:
        raise InputError("true: got no labels, expected at least one")
    return sum(edit_distance(a, b) for a, b in zip(said, true, strict=True)) / total
