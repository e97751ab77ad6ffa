"""Options that make a feed-forward part narrower: one row for its three layers together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from layerwright.core.cost import Cost, total
from layerwright.core.layer import LayerRef
from layerwright.core.option import Option, Scores
from layerwright.core.recipe import Recipe
from layerwright.core.storage import stored_bytes
from layerwright.core.treatment import Narrow, Treatments
from layerwright.treat.narrow import FeedForward

__all__ = ["narrow_of", "narrow_options", "narrowed_ref", "narrows", "without_narrow"]

Price = Callable[[LayerRef, Cost, Treatments], Cost]
"""``price(layer, cost before, treatments) -> cost after``."""


def narrows(recipe: Recipe) -> bool:
    """Whether the recipe offers narrower feed-forward parts."""
    return any(narrow_of(treatments) is not None for treatments in recipe.candidates)


def narrow_of(treatments: Treatments) -> Narrow | None:
    """The narrowing among `treatments`."""
    return next((t for t in treatments if isinstance(t, Narrow)), None)


def without_narrow(treatments: Treatments) -> Treatments:
    """What the layers of a narrowed part get besides."""
    return tuple(t for t in treatments if not isinstance(t, Narrow))


def narrowed_ref(ref: LayerRef, neurons: int, kept: int) -> LayerRef:
    """`ref`, a layer of a feed-forward part with so many neurons, with the shape that it has with `kept` of them."""
    out, in_ = ref.shape
    shape = (out, kept) if ref.role == "down" else (out // neurons * kept, in_)
    return dataclasses.replace(ref, shape=shape)


def narrow_options(
    parts: Mapping[str, FeedForward],
    candidates: Mapping[str, Sequence[Treatments]],
    before: Mapping[str, Cost],
    scores: Scores,
    price: Price,
    element_bytes: int,
) -> list[Option]:
    """A row for each narrowing candidate of a last projection; it covers the layers that feed it too.

    The damage is that of the projection, which loses columns, and of the other treatments of the layers that feed it;
    these cannot be hurt by rows that nothing reads.

    Args:
        parts: `layerwright.treat.narrow.feed_forwards`.
        candidates: by layer.
        before: cost of every planned layer as it is.
        scores: damages.
        price: cost of a layer after treatment.
        element_bytes: of an untreated weight.
    """
    found = []
    for path, part in parts.items():
        for treatments in candidates.get(path, ()):
            narrow = narrow_of(treatments)
            if narrow is None or any(ref.path not in before for ref in part.layers):
                continue
            rest = without_narrow(treatments)
            if any(rest and rest not in candidates.get(ref.path, ()) for ref in part.producers):
                continue
            kept = narrow.kept(part.neurons)
            damage = scores.damage(path, treatments)
            damage += sum(scores.damage(ref.path, rest) for ref in part.producers)
            costs = []
            for ref in part.layers:
                smaller = narrowed_ref(ref, part.neurons, kept)
                costs.append(price(smaller, _resized(before[ref.path], ref, smaller, element_bytes), rest))
            found.append(Option(path, treatments, total(costs), damage, tuple(ref.path for ref in part.layers)))
    return found


def _resized(cost: Cost, ref: LayerRef, smaller: LayerRef, element_bytes: int) -> Cost:
    """Cost of a layer, untreated, in its new shape; its bias shrinks with its rows."""
    share = smaller.numel / ref.numel
    bias = (cost.params - ref.numel) * (smaller.shape[0] / ref.shape[0])
    bias_bytes = (cost.bytes - ref.numel * element_bytes) * (smaller.shape[0] / ref.shape[0])
    return dataclasses.replace(
        cost,
        params=smaller.numel + bias,
        bytes=stored_bytes((), *smaller.shape, smaller.count, element_bytes) + bias_bytes,
        flops=cost.flops * share,
        ms=cost.ms * share,
        ms_source="modelled" if cost.ms else cost.ms_source,
    )
