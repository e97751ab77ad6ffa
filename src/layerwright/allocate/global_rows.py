"""Which output rows get more bits: the highest scores over the rows of all layers (Zheng et al., 2024, MixLLM)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from layerwright.core.errors import InputError

__all__ = ["Fractions", "RowPlan", "global_rows", "ranked_rows"]

Fractions = Mapping[int, float]
"""Width to its share of all rows (or weights); together 1."""

RowPlan = dict[str, dict[int, Tensor]]
"""Layer to width to its rows, int64 and in order; in each layer every row once."""

Unit = Literal["rows", "parameters"]


def global_rows(
    losses: Mapping[str, Tensor] | Mapping[int, Mapping[str, Tensor]],
    fractions: Fractions,
    *,
    unit: Unit = "rows",
    scope: Literal["global", "layer"] = "global",
    columns: Mapping[str, int] | None = None,
) -> RowPlan:
    """Give the first ``fractions[8]`` of the rows, by falling loss, 8 bits, and the rest the width below.

    With more than two widths this repeats from the largest on, among the rows that have none yet, each time with the
    losses of rounding to the next smaller width.

    Args:
        losses: layer to ``(out,)``, or, by the width rounded to, such a table for each but the largest width.
        fractions: width (2 to 8) to share; the smallest width takes what is left.
        unit: `rows` counts rows, whatever their length; `parameters` ranks by loss per weight and counts weights.
        scope: rank the rows of all layers together, or each layer's own.
        columns: inputs of each layer; needed for `parameters`.

    Returns:
        The rows of each width. The same whatever the order of the layers; ties go by name and row.

    Raises:
        InputError: shares that do not add up to 1, widths outside 2 to 8, no losses, losses that are not finite or all
            zero, or no `columns` where they are needed.
    """
    widths = sorted(fractions, reverse=True)
    if not widths or any(isinstance(w, bool) or not isinstance(w, int) or not 2 <= w <= 8 for w in widths):
        raise InputError(f"fractions: got widths {list(fractions)}, expected whole numbers from 2 to 8")
    shares = [float(fractions[w]) for w in widths]
    if any(not 0 <= share <= 1 for share in shares) or not math.isclose(sum(shares), 1, abs_tol=1e-6):
        raise InputError(f"fractions: {dict(fractions)} are not shares that add up to 1")
    tables = _tables(losses, widths)
    sizes = {name: len(rows) for name, rows in sorted(next(iter(tables.values())).items())}
    for table in tables.values():
        _refuse_zeros(ranked_rows(table, unit=unit, columns=columns)[3])
    if scope == "layer":
        merged: RowPlan = {}
        for name in sizes:
            own = {width: {name: table[name]} for width, table in tables.items()}
            merged |= _divide(own, widths, shares, {name: sizes[name]}, unit, columns)
        return merged
    if scope != "global":
        raise InputError(f"scope: got {scope!r}, expected global or layer")
    return _divide(tables, widths, shares, sizes, unit, columns)


def ranked_rows(
    losses: Mapping[str, Tensor], *, unit: Unit = "rows", columns: Mapping[str, int] | None = None
) -> tuple[list[str], Tensor, Tensor, Tensor]:
    """All rows by falling loss (per weight, for `parameters`): layer names; for each row its layer's number, its own
    number in it, and its loss, ``(rows,)`` each. Ties go by name and row.

    Raises:
        InputError: no rows, losses that are not finite or below 0, or no `columns` where they are needed.
    """
    names = sorted(losses)
    if unit not in ("rows", "parameters"):
        raise InputError(f"unit: got {unit!r}, expected rows or parameters")
    if unit == "parameters" and (columns is None or any(name not in columns for name in names)):
        raise InputError("columns: unit parameters needs the number of inputs of each layer")
    flat, layer, row = [], [], []
    for number, name in enumerate(names):
        values = losses[name].detach().double().cpu()
        if values.dim() != 1 or not bool((values.isfinite() & (values >= 0)).all()):
            raise InputError(f"{name}: its row losses are not finite numbers of 0 and above; score the rows again")
        flat.append(values / columns[name] if unit == "parameters" and columns is not None else values)
        layer.append(torch.full((len(values),), number))
        row.append(torch.arange(len(values)))
    if not flat:
        raise InputError("losses: no layers; score the rows first")
    together = torch.cat(flat)
    order = together.argsort(descending=True, stable=True)
    return names, torch.cat(layer)[order], torch.cat(row)[order], together[order]


def _refuse_zeros(losses: Tensor) -> None:
    if not bool((losses > 0).any()):
        raise InputError(
            "losses: all rows have loss 0; the data does not reach these layers, or they are exact already"
        )


def _tables(losses: Any, widths: list[int]) -> dict[int, Mapping[str, Tensor]]:
    """Losses of rounding to each but the largest width (to that one, where it is alone)."""
    lower = widths[1:] or widths
    if not losses:
        raise InputError("losses: no layers; score the rows first")
    by_width = all(isinstance(key, int) for key in losses)
    missing = [width for width in lower if by_width and width not in losses]
    if missing:
        raise InputError(f"losses: none of rounding to {missing[0]} bits; score the rows at that width")
    return {width: losses[width] if by_width else losses for width in lower}


def _divide(
    tables: Mapping[int, Mapping[str, Tensor]],
    widths: list[int],
    shares: list[float],
    sizes: Mapping[str, int],
    unit: Unit,
    columns: Mapping[str, int] | None,
) -> RowPlan:
    """One step for each width but the smallest: the first open rows, as many as its share allows."""
    weight = torch.tensor([columns[n] if unit == "parameters" and columns is not None else 1 for n in sizes])
    starts = torch.tensor([0, *sizes.values()]).cumsum(0)
    given = torch.full((int(starts[-1]),), widths[-1])
    free = torch.ones_like(given, dtype=torch.bool)
    total = float((torch.tensor([*sizes.values()]) * weight).sum())
    for width, below, share in zip(widths, widths[1:], shares, strict=False):
        _, layer, row, _ = ranked_rows(tables[below], unit=unit, columns=columns)
        place = starts[layer] + row
        open_ = free[place]
        place, costs = place[open_], weight[layer][open_]
        chosen = place[costs.cumsum(0) <= math.floor(share * total + 1e-6)]
        given[chosen], free[chosen] = width, False
    parts = given.split([*sizes.values()])
    return {
        name: {width: (own == width).nonzero().flatten() for width in widths}
        for name, own in zip(sizes, parts, strict=True)
    }
