"""Every choice of options tried: the slow, obvious allocator, and small random tables for it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from layerwright.core.cost import RESOURCES, Cost, total
from layerwright.core.option import Option, OptionTable
from layerwright.core.treatment import Drop, Quantize, Treatments

__all__ = ["all_covers", "best", "layered_table", "least", "merged_by_hand"]


def all_covers(table: OptionTable) -> Iterator[tuple[Option, ...]]:
    """Every set of options that covers each layer exactly once."""

    def extend(open_layers: tuple[str, ...], taken: tuple[Option, ...]) -> Iterator[tuple[Option, ...]]:
        if not open_layers:
            yield taken
            return
        for option in table.options:
            if open_layers[0] in option.covers and set(option.covers) <= set(open_layers):
                yield from extend(tuple(p for p in open_layers if p not in option.covers), (*taken, option))

    yield from extend(table.layers, ())


def within(table: OptionTable, chosen: Sequence[Option], limits: Mapping[str, float]) -> bool:
    cost = total([table.fixed, *(o.cost for o in chosen)])
    return all(cost.get(name) <= limit * (1 + 1e-12) for name, limit in limits.items())


def best(table: OptionTable, limits: Mapping[str, float]) -> float:
    """Least damage under the limits; infinite where nothing fits."""
    fitting = (chosen for chosen in all_covers(table) if within(table, chosen, limits))
    return min((math.fsum(o.damage for o in chosen) for chosen in fitting), default=math.inf)


def least(table: OptionTable, resource: str) -> float:
    """Smallest total of a resource."""
    return min(total([table.fixed, *(o.cost for o in chosen)]).get(resource) for chosen in all_covers(table))


def merged_by_hand(
    table: OptionTable, groups: Sequence[Sequence[str]]
) -> dict[tuple[frozenset[str], Treatments], tuple[float, float]]:
    """``(covers, treatments) -> (damage, bytes)`` after tying the groups, for tables of one option per treatment."""
    found: dict[tuple[frozenset[str], Treatments], tuple[float, float]] = {}
    grouped = {path for group in groups for path in group}
    for option in table.options:
        if len(option.covers) > 1 or option.layer not in grouped:
            found[frozenset(option.covers), option.treatments] = (option.damage, option.cost.bytes)
    for group in groups:
        for treatments in {o.treatments for o in table.options}:
            rows = [o for path in group for o in table.options if o.covers == (path,) and o.treatments == treatments]
            if len(rows) == len(group):
                found[frozenset(group), treatments] = (
                    sum(o.damage for o in rows),
                    sum(o.cost.bytes for o in rows),
                )
    return found


def layered_table(
    seed: int,
    layers: int,
    options: int,
    *,
    per_block: int = 0,
    ties: bool = False,
    whole: bool = True,
    steep: float = 1.0,
) -> OptionTable:
    """A random table: each layer kept or in `options - 1` quantized forms, blocks that can be dropped, tied layers.

    Args:
        seed: of everything.
        layers: number of layers.
        options: options per layer.
        per_block: layers per droppable block; 0 has no blocks.
        ties: some blocks' first two layers have options that cover both, and none of their own.
        whole: whole numbers as costs, so that sums meet limits exactly.
        steep: spread of the damages in powers of e.
    """
    random = np.random.default_rng(seed)
    forms = [Quantize(bits, group) for bits in range(2, 9) for group in (-1, 32, 64)]
    rows: list[Option] = []
    names = [f"b{i // per_block}.l{i % per_block}" if per_block else f"l{i}" for i in range(layers)]
    tied = set[str]()
    units: list[tuple[str, ...]] = []
    for i, name in enumerate(names):
        if name in tied:
            continue
        pair = ties and bool(per_block) and name.endswith(".l0") and names[i + 1 : i + 2] == [name[:-1] + "1"]
        unit = (name, names[i + 1]) if pair and random.random() < 0.5 else (name,)
        tied.update(unit)
        units.append(unit)

    def cost(share: float, size: int) -> Cost:
        amount = {r: size * share * random.uniform(0.8, 1.2) * 100 for r in ("bytes", "ms", "flops")}
        if whole:
            amount = {name: float(round(value)) for name, value in amount.items()}
        return Cost(params=size, ms_source="modelled", **amount)

    for unit in units:
        size = int(random.integers(1, 20)) * len(unit)
        sensitivity = math.exp(random.normal(0, steep))
        rows.append(Option(unit[0], (), cost(1.0, size), 0.0, unit))
        for i in random.choice(len(forms), min(options - 1, len(forms)), replace=False).tolist():
            damage = sensitivity * 4.0 ** -forms[i].bits * math.exp(random.normal(0, 0.5))
            rows.append(Option(unit[0], (forms[i],), cost(forms[i].bits / 16, size), float(damage), unit))
    for b in range(layers // per_block if per_block else 0):
        covers = tuple(names[b * per_block : (b + 1) * per_block])
        norms = Cost(bytes=-float(random.integers(0, 200)), params=-2.0)
        rows.append(Option(f"b{b}", (Drop(),), norms, float(math.exp(random.normal(-2, steep))), covers))
    fixed = Cost(**dict.fromkeys(RESOURCES, 500.0))
    kept = total([fixed, *(o.cost for o in rows if not o.treatments)])
    return OptionTable(tuple(rows), fixed, kept, 2.0)
