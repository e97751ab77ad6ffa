"""MixLLM's decision (Zheng et al., 2024): which output rows, over all layers together, get 8 bits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from layerwright.allocate.global_rows import RowPlan, Unit, global_rows, ranked_rows
from layerwright.core.budget import Budget
from layerwright.core.errors import BudgetError, InputError
from layerwright.core.layer import LayerRef
from layerwright.core.option import Scores
from layerwright.core.row_ranges import rows_to_text
from layerwright.core.storage import stored_bytes
from layerwright.core.treatment import MixRows, Treatments
from layerwright.recipes.deciders import Choice, Task
from layerwright.score.output_rows import Order, output_row_loss, round_rows

__all__ = ["decide_mixllm", "mixed_layers", "nominal_bits", "rows_for_bits"]


def mixed_layers(rows: RowPlan, **settings: Any) -> dict[str, Treatments]:
    """`MixRows` treatments of a row plan; the smallest width is the one that is not listed."""
    found: dict[str, Treatments] = {}
    for path, widths in rows.items():
        low = min(widths)
        listed = {width: own.tolist() for width, own in widths.items() if width != low and len(own)}
        found[path] = (MixRows(bits=low, rows=rows_to_text(listed), **settings),)
    return found


def nominal_bits(rows: RowPlan, columns: Mapping[str, int]) -> float:
    """Average bits of a weight, scales and zero points left out."""
    bits = sum(width * len(own) * columns[path] for path, widths in rows.items() for width, own in widths.items())
    return bits / sum(len(own) * columns[path] for path, widths in rows.items() for own in widths.values())


def rows_for_bits(
    losses: Mapping[str, Tensor],
    columns: Mapping[str, int],
    bits: float,
    *,
    high: int = 8,
    low: int = 4,
    unit: Unit = "rows",
) -> RowPlan:
    """As many of the worst rows at `high` bits as keep the average over all weights at or below `bits`.

    With layers of one input size these are the rows that `global_rows` gives for the share ``(bits - low) / (high -
    low)``; with several sizes the average is that of the weights, not of the rows.

    Raises:
        BudgetError: `bits` is below `low`.
    """
    if bits < low:
        raise BudgetError(f"bits={bits:g} is below the width of the narrower rows; the smallest reachable is {low}")
    names, layer, row, _ = ranked_rows(losses, unit=unit, columns=columns)
    cost = torch.tensor([columns[name] for name in names], dtype=torch.float64)[layer] * (high - low)
    total = sum(len(losses[name]) * columns[name] for name in names)
    # Every row of the order up to the first that no longer fits: the choice for less is part of the choice for more.
    taken = int((cost.cumsum(0) <= (bits - low) * total * (1 + 1e-12) + 1e-9).sum())
    plan: RowPlan = {}
    for number, name in enumerate(names):
        chosen = row[:taken][layer[:taken] == number].sort().values
        rest = torch.ones(len(losses[name]), dtype=torch.bool)
        rest[chosen] = False
        plan[name] = {high: chosen, low: rest.nonzero().flatten()}
    return plan


def decide_mixllm(task: Task) -> Choice:
    """Score every row of the linear layers in the blocks, and spend the budget on the worst ones.

    Settings (`Recipe.decider_settings`): `high` and `low` widths (8, 4); `group_size` (128); `order` of the score
    (``first+second``, ``second``, ``diagonal``); `unit` (``rows``, ``parameters``); `method` (``gptq``, ``rtn``) and
    `clip`; `act_bits` (8); `fractions` (width to share of the rows, instead of what the budget allows); `scope`
    (``global``, ``layer``; with `fractions` only).

    A budget ``bits=4.4`` bounds the average bits of these layers' weights, scales and zero points left out; ``size=``
    bounds the bytes of the whole model, all included. The head, embeddings and layers outside blocks stay as they are.

    Raises:
        BudgetError: a limit that cannot be held, or of another kind.
        InputError: a group size that does not divide a layer's inputs, or a target that cannot load mixed rows.
    """
    settings = _settings(task.recipe.decider_settings)
    refs = [ref for ref in task.refs if ref.layout in ("linear", "conv1d") and ref.block is not None and not ref.tied]
    _check(task, refs, settings)
    width, low, high = settings["group_size"], settings["low"], settings["high"]
    columns = {ref.path: ref.shape[1] for ref in refs}
    data = task.bench.calibration.head(task.recipe.score_samples)
    progress = task.progress
    scored = output_row_loss(
        task.bench.model,
        data,
        refs,
        round_rows(low, width),
        order=settings["order"],
        progress=None if progress is None else lambda done, total: progress("scoring rows", done, total),
    )
    given = {
        "group_size": width,
        "method": settings["method"],
        "clip": settings["clip"],
        "act_bits": settings["act_bits"],
    }
    bits = next((limit.value for limit in task.budget if limit.name == "bits"), math.inf)
    if settings["fractions"] is not None:
        shares = {int(w): float(share) for w, share in settings["fractions"].items()}
        rows = global_rows(scored.losses, shares, unit=settings["unit"], scope=settings["scope"], columns=columns)
        if nominal_bits(rows, columns) > bits + 1e-9:
            raise BudgetError(f"fractions: {shares} are {nominal_bits(rows, columns):.3f} bits, above bits={bits:g}")
        _hold(task, refs, mixed_layers(rows, **given))
    else:
        rows = _within(task, refs, scored.losses, columns, bits, settings, given)
    layers = mixed_layers(rows, **given)
    used = sum(_bytes(ref, layers[ref.path], task.element_bytes) for ref in refs)
    weights = sum(ref.numel for ref in refs)
    nominal = nominal_bits(rows, columns)
    effective = 8 * used / weights
    total = {path: float(loss.sum()) for path, loss in scored.losses.items()}
    order: Order = settings["order"]
    return Choice(
        layers,
        reasons={path: _reason(rows[path], total[path], high) for path in layers},
        notes=(
            f"rows ranked over {len(refs)} layers by {order} loss change of {low} bits on {scored.samples} samples; "
            f"{nominal:.3f} bits a weight, {effective:.3f} with scales, zero points and places"
            + (f"; not reached by every sample: {', '.join(scored.unused[:5])}" if scored.unused else "")
        ),
        scores={
            "rows": Scores("output_row_loss", sensitivities=total, data=data.fingerprint(), meta=_meta(scored.losses))
        },
        extra={"nominal_bits": nominal, "effective_bits": effective, "high_rows": _counts(rows, high)},
    )


def _settings(given: Mapping[str, Any]) -> dict[str, Any]:
    known: dict[str, Any] = {
        "high": 8, "low": 4, "group_size": 128, "order": "first+second", "unit": "rows", "scope": "global",
        "method": "gptq", "clip": True, "act_bits": 8, "fractions": None,
    }  # fmt: skip
    unknown = [key for key in given if key not in known]
    if unknown:
        raise InputError(f"decider_settings: unknown {', '.join(unknown)}; known: {', '.join(known)}")
    settings = {**known, **given}
    high, low = settings["high"], settings["low"]
    if not all(isinstance(w, int) and 2 <= w <= 8 for w in (high, low)) or low >= high:
        raise InputError(
            f"decider_settings: got widths {low!r} and {high!r}, expected two from 2 to 8, the lower first"
        )
    return settings


def _check(task: Task, refs: Sequence[LayerRef], settings: Mapping[str, Any]) -> None:
    size = settings["group_size"]
    if not refs:
        raise InputError(f"{task.bench.name} has no linear layers in blocks; mixllm treats only these")
    bad = [f"{ref.path} ({ref.shape[1]})" for ref in refs if size != -1 and ref.shape[1] % size]
    if bad:
        raise InputError(f"group_size: {size} does not divide the inputs of {', '.join(bad[:5])}; set a divisor")
    refusal = task.target.refuses((MixRows(group_size=size),))
    if refusal:
        raise InputError(f"{refusal}: rows of mixed widths load in layerwright only")
    other = [limit.name for limit in task.budget if limit.name not in ("bits", "size")]
    if other:
        raise BudgetError(f"budget: mixllm holds bits= and size=, not {', '.join(other)}=")


def _within(
    task: Task,
    refs: Sequence[LayerRef],
    losses: Mapping[str, Tensor],
    columns: Mapping[str, int],
    bits: float,
    settings: Mapping[str, Any],
    given: Mapping[str, Any],
) -> RowPlan:
    """The largest choice of worst rows within all limits."""
    high, low = settings["high"], settings["low"]
    bound = _size_limit(task)
    best = min(bits, float(high))

    def plan(average: float) -> RowPlan:
        return rows_for_bits(losses, columns, average, high=high, low=low, unit=settings["unit"])

    if bound is None or _total(task, refs, mixed_layers(plan(best), **given)) <= bound:
        return plan(best)
    least = _total(task, refs, mixed_layers(plan(low), **given))
    if least > bound:
        raise BudgetError(f"size: {bound:,.0f} bytes cannot be reached; all rows at {low} bits are {least:,.0f}")
    inside, outside = float(low), best
    for _ in range(50):  # bytes never fall with the average, up to the places that a first mixed row brings
        middle = (inside + outside) / 2
        fits = _total(task, refs, mixed_layers(plan(middle), **given)) <= bound
        inside, outside = (middle, outside) if fits else (inside, middle)
    return plan(inside)


def _size_limit(task: Task) -> float | None:
    """Bytes of the whole model, where the budget says ``size=``."""
    budget: Budget = task.budget
    return next((task.limits["bytes"] for limit in budget if limit.name == "size"), None)


def _hold(task: Task, refs: Sequence[LayerRef], layers: Mapping[str, Treatments]) -> None:
    bound, total = _size_limit(task), _total(task, refs, layers)
    if bound is not None and total > bound:
        raise BudgetError(f"size: {bound:,.0f} bytes cannot be reached with these fractions; they take {total:,.0f}")


def _total(task: Task, refs: Sequence[LayerRef], layers: Mapping[str, Treatments]) -> float:
    before = sum(ref.numel for ref in refs) * task.element_bytes
    after = sum(_bytes(ref, layers[ref.path], task.element_bytes) for ref in refs)
    return task.profile.total.bytes - before + after


def _bytes(ref: LayerRef, treatments: Treatments, element_bytes: int) -> int:
    return stored_bytes(treatments, *ref.shape, ref.count, element_bytes)


def _counts(rows: RowPlan, high: int) -> dict[str, int]:
    return {path: len(widths.get(high, ())) for path, widths in rows.items()}


def _reason(widths: Mapping[int, Tensor], loss: float, high: int) -> str:
    count = sum(len(own) for own in widths.values())
    chosen = len(widths.get(high, ()))
    return f"{chosen} of {count} rows ({chosen / count:.0%}) are among the worst of the model; all its rows: {loss:.3g}"


def _meta(losses: Mapping[str, Tensor]) -> dict[str, Any]:
    return {"rows": {path: [float(f"{value:.5g}") for value in loss.tolist()] for path, loss in losses.items()}}
