"""Bits of attention's two products by their contribution to the prediction.

The products have no weights, so that a budget of bytes does not bound them. Their own budget is the mean width: as many
bits on average as the layers got.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from layerwright.allocate import ALLOCATORS
from layerwright.core.cost import Cost
from layerwright.core.layer import LayerRef
from layerwright.core.option import Allocation, Option, OptionTable, Scores
from layerwright.core.treatment import Quantize, RoundAttention, Treatments
from layerwright.recipes.decided import with_attention
from layerwright.score.relevance.contribution import quantization_noise

__all__ = ["mean_bits", "product_bits", "with_attention_bits"]


def product_bits(
    omega: Mapping[str, float], paths: Sequence[str], average: int, sizes: Mapping[str, float] | None = None
) -> dict[str, int]:
    """Width of each product: least ``sum Omega 4**-bits`` with at most `average` bits in the mean.

    Args:
        omega: contributions; the products of a module are ``<path>:scores`` and ``<path>:values``.
        paths: attention modules.
        average: 2 to 8; a product gets it, one bit less or one bit more.
        sizes: how much each product counts in the mean (multiplications); alike by default.

    Returns:
        Bits by ``<path>:scores`` and ``<path>:values``.
    """
    names = [f"{path}:{part}" for path in paths for part in ("scores", "values")]
    weight = {name: 1.0 if sizes is None else float(sizes[name]) for name in names}
    choices = [b for b in (average - 1, average, average + 1) if 2 <= b <= 8]
    rows = tuple(
        Option(name, (RoundAttention(b),), Cost(bytes=weight[name] * b), omega.get(name, 0.0) * quantization_noise(b))
        for name in names
        for b in choices
    )
    allocation = ALLOCATORS.get("integer")(OptionTable(rows), {"bytes": average * sum(weight.values())})
    found: dict[str, int] = {}
    for option in allocation.chosen:
        (rounding,) = option.treatments
        assert isinstance(rounding, RoundAttention)
        found[option.layer] = rounding.bits
    return found


def mean_bits(allocation: Allocation, refs: Sequence[LayerRef]) -> int:
    """The mean width of the quantized weights of `allocation`, each weight counted once, rounded; 8 if there are none."""
    size = {ref.path: ref.numel for ref in refs}
    widths = [
        (sum(size.get(path, 0) for path in option.covers), t.bits)
        for option in allocation.chosen
        for t in option.treatments
        if isinstance(t, Quantize)
    ]
    whole = sum(n for n, _ in widths)
    return round(sum(n * b for n, b in widths) / whole) if whole else 8


def with_attention_bits(
    allocation: Allocation, refs: Sequence[LayerRef], treatments: Treatments, scores: Scores | None
) -> Allocation:
    """`allocation` with `treatments` for every attention module; where `scores` know what the products contribute,
    with widths by contribution, in the mean those of the layers' weights (`product_bits`).
    """
    omega = scores.sensitivities if scores is not None else {}
    modules = [ref for ref in refs if ref.kind == "attention"]
    known = any(f"{ref.path}:values" in omega for ref in modules)
    if not known or not any(isinstance(t, RoundAttention) for t in treatments):
        return with_attention(allocation, refs, treatments)
    bits = product_bits(omega, [ref.path for ref in modules], min(max(mean_bits(allocation, refs), 2), 8))
    for ref in modules:
        own = tuple(
            dataclasses.replace(t, bits=bits[f"{ref.path}:values"], key_bits=bits[f"{ref.path}:scores"])
            if isinstance(t, RoundAttention)
            else t
            for t in treatments
        )
        allocation = with_attention(allocation, [ref], own)
    return allocation
