"""From costs and scores to the option table, and from a budget in words to limits in numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence

from layerwright.core.blocks import Blocks
from layerwright.core.budget import Budget
from layerwright.core.conv_factors import factored_weights
from layerwright.core.cost import Cost, total
from layerwright.core.errors import InputError
from layerwright.core.layer import LayerRef
from layerwright.core.option import Option, OptionTable, Scores
from layerwright.core.profile import Profile
from layerwright.core.recipe import Recipe
from layerwright.core.storage import kept_weights, stored_bytes
from layerwright.core.target import Target
from layerwright.core.treatment import Drop, FactorConv, LowRank, Quantize, Sparsify, Treatments
from layerwright.recipes.width import narrow_of, narrow_options
from layerwright.treat.narrow import FeedForward

__all__ = ["candidates_for", "fused_groups", "limits_of", "option_table", "treated_cost", "uniform_bytes"]

MsOf = Callable[[LayerRef, Treatments, float], float]
"""``ms(layer, treatments, ms before) -> ms after``."""


def candidates_for(
    refs: Sequence[LayerRef],
    recipe: Recipe,
    target: Target,
    element_bytes: int,
    parts: Collection[str] = (),
) -> dict[str, tuple[Treatments, ...]]:
    """The recipe's treatments that fit each layer and that the target loads.

    `parts` are the last projections of feed-forward parts that can be made narrower; other layers cannot.

    A treatment that cannot be stored in the layer's shape (a group that does not divide the inputs, a rank that is
    not below the layer's) or that saves nothing is left out for that layer.
    """
    fitting: dict[str, tuple[Treatments, ...]] = {}
    for ref in refs:
        before = ref.numel * element_bytes
        kept = []
        for treatments in recipe.candidates:
            if target.refuses(treatments) or not _fits(ref, treatments):
                continue
            if narrow_of(treatments) is not None and ref.path not in parts:
                continue
            if stored_bytes(treatments, *ref.shape, ref.count, element_bytes) < before:
                kept.append(treatments)
        fitting[ref.path] = tuple(kept)
    return fitting


def _fits(ref: LayerRef, treatments: Treatments) -> bool:
    narrow = narrow_of(treatments)
    if narrow is not None:
        if narrow.kept(ref.shape[1]) == ref.shape[1]:
            return False
        ref = dataclasses.replace(ref, shape=(ref.shape[0], narrow.kept(ref.shape[1])))
    for t in treatments:
        if isinstance(t, Quantize) and t.group_size != -1 and ref.shape[1] % t.group_size:
            return False
        if isinstance(t, Quantize) and t.act_bits and ref.layout not in ("linear", "conv1d"):
            return False
        if isinstance(t, Sparsify) and t.pattern == "2:4" and ref.shape[1] % 4:
            return False
        if isinstance(t, LowRank) and t.inner >= min(ref.shape):
            return False
    return True


def treated_cost(ref: LayerRef, before: Cost, treatments: Treatments, element_bytes: int, ms: MsOf | None) -> Cost:
    """Cost of the layer after `treatments`, from its cost before."""
    if not treatments:
        return before
    out, in_ = ref.shape
    share = 1.0
    params = float(ref.numel)
    for t in treatments:
        if isinstance(t, LowRank):
            params = float(ref.count * t.inner * (out + in_))
            share = params / ref.numel
        elif isinstance(t, FactorConv):
            params = float(factored_weights(t, out, in_))
            share = params / ref.numel
        elif isinstance(t, Sparsify):
            params = float(ref.count * kept_weights(out, in_, t.sparsity))
    extra = before.params - ref.numel  # the bias stays as it is
    return dataclasses.replace(
        before,
        params=params + extra,
        bytes=before.bytes - ref.numel * element_bytes + stored_bytes(treatments, out, in_, ref.count, element_bytes),
        flops=before.flops * share,
        ms=ms(ref, treatments, before.ms) if ms is not None else before.ms * share,
        ms_source=before.ms_source if ms is not None or share == 1.0 else "modelled",
    )


def option_table(
    profile: Profile,
    refs: Sequence[LayerRef],
    candidates: Mapping[str, Sequence[Treatments]],
    scores: Scores | None,
    *,
    element_bytes: int,
    blocks: Sequence[Blocks] = (),
    drop_scores: Scores | None = None,
    ms: MsOf | None = None,
    parts: Mapping[str, FeedForward] | None = None,
) -> OptionTable:
    """All options: keep each layer, give it one of its candidates, make its part narrower, or drop its block.

    Args:
        profile: costs of every layer and block as they are.
        refs: the layers that are planned; the rest is fixed.
        candidates: treatment sets by layer.
        scores: damages of the candidates.
        element_bytes: bytes of one untreated weight.
        blocks: with `drop_scores`, the stacks whose blocks may go.
        drop_scores: sensitivity of each block that may be dropped.
        ms: time after treatment; without it, time falls with FLOPs.
        parts: feed-forward parts that may be made narrower, by their last projection.
    """
    before = {ref.path: profile[ref.path].cost for ref in refs}
    options: list[Option] = []
    for ref in refs:
        options.append(Option(ref.path, (), before[ref.path], 0.0))
        for treatments in candidates.get(ref.path, ()):
            if scores is None:
                raise InputError("candidates without scores: measure them first")
            if narrow_of(treatments) is not None:
                continue
            cost = treated_cost(ref, before[ref.path], treatments, element_bytes, ms)
            options.append(Option(ref.path, treatments, cost, scores.damage(ref.path, treatments)))
    planned = {ref.path for ref in refs}
    if parts and scores is not None:

        def price(ref: LayerRef, cost: Cost, treatments: Treatments) -> Cost:
            return treated_cost(ref, cost, treatments, element_bytes, ms)

        options += narrow_options(parts, candidates, before, scores, price, element_bytes)
    if drop_scores is not None:
        for stack in blocks:
            for name in stack.names:
                inside = tuple(path for path in planned_in(name, refs) if path in planned)
                damage = drop_scores.sensitivities.get(name)
                if inside and damage is not None:
                    rest = total(before[path] for path in inside) - profile[name].cost
                    options.append(Option(name, (Drop(),), rest, damage, inside))
    fixed = profile.total - total(before.values())
    return OptionTable(tuple(options), fixed, profile.total, profile.loss)


def planned_in(block: str, refs: Sequence[LayerRef]) -> list[str]:
    """Paths of the layers of `refs` inside `block`."""
    return [ref.path for ref in refs if ref.path.startswith(block + ".")]


def fused_groups(refs: Sequence[LayerRef], target: Target) -> list[list[str]]:
    """Layers that `target` fuses into one, and layers that share a weight: each group must be treated alike."""
    groups: dict[tuple[str, int], list[str]] = {}
    for ref in refs:
        for number, roles in enumerate(target.fused):
            if ref.role in roles:
                groups.setdefault((ref.path.rpartition(".")[0], number), []).append(ref.path)
    return [group for group in groups.values() if len(group) > 1]


def uniform_bytes(refs: Sequence[LayerRef], bits: float, group_size: int, element_bytes: int) -> float:
    """Bytes of the layers' weights at `bits` each, with scales per group of `group_size` (per channel where it does
    not divide); exactly what uniform quantization stores when `bits` is whole.
    """
    size = 0.0
    for ref in refs:
        group = group_size if group_size != -1 and ref.shape[1] % group_size == 0 else -1
        if bits in range(2, 9):
            size += stored_bytes((Quantize(int(bits), group),), *ref.shape, ref.count, element_bytes)
        else:
            scales = ref.count * ref.shape[0] * (1 if group == -1 else ref.shape[1] // group) * element_bytes
            size += ref.numel * bits / 8 + (scales if bits < 16 else 0)
    return size


def limits_of(
    budget: Budget, table: OptionTable, refs: Sequence[LayerRef], group_size: int, element_bytes: int
) -> dict[str, float]:
    """The budget as absolute upper bounds on the whole model, by field of `Cost`."""
    limits: dict[str, float] = {}
    for limit in budget:
        if limit.name == "bits":
            weights = sum(ref.numel for ref in refs) * element_bytes
            untouched = table.original.bytes - weights  # embeddings, norms, biases
            bound = untouched + uniform_bytes(refs, limit.value, group_size, element_bytes)
        elif limit.unit == "relative":
            bound = limit.value * table.original.get(limit.resource)
            if bound <= 0:
                raise InputError(f"budget: {limit} cannot be measured on this model (its {limit.name} is 0)")
        else:
            bound = limit.value
        limits[limit.resource] = min(bound, limits.get(limit.resource, bound))
    return limits
