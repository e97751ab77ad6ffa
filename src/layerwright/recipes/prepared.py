"""What a preparation adds to a model: biases and norm weights that were not there, in the costs and in the budget."""

from __future__ import annotations

import dataclasses

from torch import nn

from layerwright.core.budget import Budget
from layerwright.core.cost import Cost
from layerwright.core.layer import LayerRef
from layerwright.core.layers import parameter_bytes
from layerwright.core.option import OptionTable
from layerwright.core.profile import Profile
from layerwright.recipes.table import limits_of

__all__ = ["prepared_limits", "prepared_profile"]


def prepared_profile(profile: Profile, before: nn.Module, after: nn.Module) -> Profile:
    """`profile` of the model `before`, with the parameters and bytes of the prepared model `after`.

    A shift that is moved out of a norm gives its readers a bias where they had none. Loss, times and fingerprint stay
    those of the model as it was given.
    """
    if before is after:
        return profile
    old, new = dict(before.named_modules()), dict(after.named_modules())
    rows = tuple(
        dataclasses.replace(row, cost=_added(row.cost, old[row.ref.path], new[row.ref.path]))
        if row.ref.path in old
        else row
        for row in profile
    )
    return dataclasses.replace(profile, layers=rows, total=_added(profile.total, before, after))


def prepared_limits(
    budget: Budget, before: Cost, after: Cost, refs: tuple[LayerRef, ...], group_size: int, element_bytes: int
) -> dict[str, float]:
    """`layerwright.recipes.table.limits_of` for a prepared model: shares are of the model as it was given (`before`),
    and a budget in bits, which is about weights, leaves what was added (`after`) on top.
    """
    found: dict[str, float] = {}
    for limit in budget:
        table = OptionTable((), original=after if limit.name == "bits" else before)
        found |= limits_of(Budget((limit,)), table, refs, group_size, element_bytes)
    return found


def _added(cost: Cost, before: nn.Module, after: nn.Module) -> Cost:
    params = sum(p.numel() for p in after.parameters()) - sum(p.numel() for p in before.parameters())
    more = parameter_bytes(after) - parameter_bytes(before)
    return dataclasses.replace(cost, params=cost.params + params, bytes=cost.bytes + more)
