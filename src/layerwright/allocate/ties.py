"""Tables made smaller before they are solved: layers that share a decision, options that a target cannot load."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from layerwright.core.cost import total
from layerwright.core.errors import InputError, unknown_name
from layerwright.core.option import Option, OptionTable
from layerwright.core.target import Target, target
from layerwright.core.treatment import Treatments

__all__ = ["filter_target", "merge_ties"]


def merge_ties(table: OptionTable, groups: Sequence[Sequence[str]]) -> OptionTable:
    """The table in which all layers of a group get the same treatments.

    Options of a group with equal treatments become one that covers them all; damages and costs add up. Treatments that
    some member lacks are left out. Options that reach beyond a group, such as a block's, stay. Groups of one change
    nothing.

    Raises:
        InputError: an unknown layer, a layer in two groups, an option that covers a part of a group and something
            else, or a group without a common treatment.
    """
    known, group_of = set(table.layers), {}
    for g, group in enumerate(groups):
        for path in dict.fromkeys(group):
            if path not in known:
                raise unknown_name("layer", path, known, "a group of tied layers")
            if path in group_of:
                raise InputError(f"groups: {path} stands in two groups; make them one")
            group_of[path] = g
    members: dict[int, list[Option]] = {}
    rows: list[Option | int] = []
    for option in table.options:
        touched = {group_of.get(path, -1) for path in option.covers}
        inside = len(touched) == 1 and -1 not in touched
        whole = [g for g in touched if g >= 0 and set(groups[g]) <= set(option.covers)]
        if inside and not whole:
            (g,) = touched
            if g not in members:
                rows.append(g)
            members.setdefault(g, []).append(option)
        elif len(whole) + (-1 in touched) == len(touched):
            rows.append(option)
        else:
            raise InputError(f"groups: {option.layer} covers a part of a group and layers outside; widen the group")
    merged: list[Option] = []
    for row in rows:
        merged.extend([row] if isinstance(row, Option) else _merge(groups[row], members[row]))
    return replace(table, options=tuple(merged))


def _merge(group: Sequence[str], options: Sequence[Option]) -> list[Option]:
    """The common options of a group."""
    units: dict[frozenset[str], dict[Treatments, Option]] = {}
    for option in options:
        by_treatment = units.setdefault(frozenset(option.covers), {})
        best = by_treatment.get(option.treatments)
        if best is None or option.damage < best.damage:
            by_treatment[option.treatments] = option
    covers = tuple(dict.fromkeys(path for option in options for path in option.covers))
    if sum(map(len, units)) != len(covers):
        raise InputError(f"groups: options of {', '.join(group)} overlap; tie their layers one way only")
    first, *others = units.values()
    common = [t for t in first if all(t in other for other in others)]
    if not common:
        raise InputError(f"groups: {', '.join(group)} have no treatment in common; offer each of them the same options")
    return [
        Option(
            layer=next(path for path in group if path in covers),
            treatments=t,
            cost=total(unit[t].cost for unit in units.values()),
            damage=sum(unit[t].damage for unit in units.values()),
            covers=covers,
        )
        for t in common
    ]


def filter_target(table: OptionTable, to: str | Target) -> OptionTable:
    """The table without the options that a target cannot load.

    Roles that the target fuses into one matrix are the caller's groups for `merge_ties`.

    Raises:
        InputError: a layer loses every option but a dropped block's; names the layer and the first refusal.
    """
    chosen = target(to)
    refusals = [chosen.refuses(option.treatments) for option in table.options]
    kept = tuple(option for option, why in zip(table.options, refusals, strict=True) if not why)

    def weighted(option: Option) -> bool:
        return all(t.scope == "weight" for t in option.treatments)

    decided = {path for option in kept if weighted(option) for path in option.covers}
    for option, why in zip(table.options, refusals, strict=True):
        if why and weighted(option) and not decided.issuperset(option.covers):
            raise InputError(f"target: no option of {option.layer} is left: {why}; offer one that {chosen.name} loads")
    left = {path for option in kept for path in option.covers}
    for path in table.layers:
        if path not in left:
            raise InputError(f"target: no option of {path} is left that {chosen.name} loads")
    return replace(table, options=kept)
