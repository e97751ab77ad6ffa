"""Settle a choice by measuring it: treat, measure, set the table right, choose again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace

from layerwright.core.calibration import Calibration
from layerwright.core.errors import BudgetError
from layerwright.core.option import Allocation, Option, OptionTable
from layerwright.core.plan import Plan
from layerwright.recipes.bench import Bench
from layerwright.score.replay import model_damage
from layerwright.treat.apply import apply_plan

__all__ = ["choose_by_measuring", "correct_kinds", "kind_factors", "split_for_measuring"]

HOPELESS = 5.0
"""A kind alone whose predicted damage is this many times the joint one's is not measured."""
BETTER = 0.1
"""Share by which a mixture's measured damage must be below a single kind's."""
FACTORS = (0.5, 20.0)
"""Bounds of what one measurement may do to the damages of a kind."""

Kind = tuple[str, ...]


def choose_by_measuring(
    bench: Bench,
    table: OptionTable,
    joint: Allocation,
    solve: Callable[[OptionTable], Allocation],
    samples: int,
    rounds: int = 1,
) -> tuple[OptionTable, Allocation, str]:
    """The choice after measuring: the corrected table, the best choice that was measured, and a sentence.

    Damages are predicted one layer at a time and added up; strong treatments do more together. So the joint choice
    and each single kind's are carried out and measured on calibration data that the treatments have not seen; the
    damages of every kind are scaled to explain what was measured (`kind_factors`), and the program chooses again,
    at most `rounds` times. A mixture is taken if it does at least `BETTER` less damage than the best kind alone: below
    that the difference does not carry over to other data. A kind alone that is predicted to do more than `HOPELESS` times the joint damage is not
    tried. Cost: one simulated treatment of the model and two forwards of `samples` samples per choice.
    """
    tags = sorted({t.tag for option in table.options for t in option.treatments})
    found = {"together": joint}
    for tag in tags if len(tags) > 1 else ():
        alone = tuple(o for o in table.options if all(t.tag == tag for t in o.treatments))
        try:
            single = solve(replace(table, options=alone))
        except BudgetError:
            continue
        if single.damage <= HOPELESS * max(joint.damage, 1e-9):
            found[f"{tag} alone"] = single
    if len(tags) < 2:
        return table, joint, ""
    fitting, unseen = split_for_measuring(bench.calibration, samples)

    def measure(allocation: Allocation) -> float:
        layers = Plan.from_allocation(allocation).layers
        treated, _ = apply_plan(bench.model, layers, fitting, simulate=True)
        return model_damage(bench.model, treated, unseen)

    measured = {name: measure(allocation) for name, allocation in found.items()}
    factors: dict[Kind, float] = {}
    for number in range(rounds):
        factors = kind_factors([(_shares(a), measured[name]) for name, a in found.items()])
        again = solve(correct_kinds(table, factors))
        if any(_same(again, other) for other in found.values()):
            break
        name = f"together, round {number + 2}"
        found[name] = _in_terms_of(again, table)
        measured[name] = measure(again)
    best = min(measured, key=lambda name: measured[name] * (1.0 if name.endswith(" alone") else 1 / (1 - BETTER)))
    corrected = correct_kinds(table, factors)
    words = ", ".join(f"{name} +{value:.4f}" for name, value in measured.items())
    return corrected, _in_terms_of(found[best], corrected), f"measured damage: {words}; taken: {best}"


def kind_factors(measured: list[tuple[Mapping[Kind, float], float]]) -> dict[Kind, float]:
    """What each kind's predicted damages must be multiplied by, so that predictions agree with measured totals.

    Args:
        measured: for each choice, the predicted damage by kind, and the measured damage of all.

    Choices of one kind tell that kind's factor; of mixed ones, the latest tells of the kinds that are left, which
    share one. Factors are kept within `FACTORS`.
    """
    low, high = FACTORS
    factors: dict[Kind, float] = {}
    for shares, total in measured:
        kinds = [kind for kind, share in shares.items() if share > 0]
        if len(kinds) == 1:
            factors[kinds[0]] = min(max(total / shares[kinds[0]], low), high)
    known = dict(factors)
    for shares, total in measured:
        left = {kind: share for kind, share in shares.items() if kind not in known and share > 0}
        if left:
            explained = sum(known[kind] * share for kind, share in shares.items() if kind in known)
            factor = min(max((total - explained) / sum(left.values()), low), high)
            factors.update(dict.fromkeys(left, factor))
    return factors


def correct_kinds(table: OptionTable, factors: Mapping[Kind, float]) -> OptionTable:
    """`table` with the damages of each kind multiplied by its factor; a kind without one keeps its damages."""
    return replace(
        table, options=tuple(replace(o, damage=o.damage * factors.get(_kind(o), 1.0)) for o in table.options)
    )


def split_for_measuring(calibration: Calibration, samples: int) -> tuple[Calibration, Calibration]:
    """``(to treat with, to measure on)``: the last batches, with `samples` samples but at most a quarter of all, are
    measured on; fewer than four batches serve for both.
    """
    batches = list(calibration.batches)
    per_batch = max(calibration.samples // len(batches), 1)
    count = min(max(samples // per_batch, 1), len(batches) // 4)
    if not count:
        return calibration, calibration
    first, last = (
        Calibration(part, calibration.loss_fn, name=calibration.name, unit=calibration.unit, device=calibration.device)
        for part in (batches[:-count], batches[-count:])
    )
    return first, last


def _kind(option: Option) -> Kind:
    return tuple(t.tag for t in option.treatments)


def _shares(allocation: Allocation) -> dict[Kind, float]:
    shares: Counter[Kind] = Counter()
    for option in allocation.chosen:
        if option.treatments:
            shares[_kind(option)] += option.damage  # type: ignore[assignment]
    return dict(shares)


def _same(one: Allocation, other: Allocation) -> bool:
    return {(o.layer, o.treatments) for o in one.chosen} == {(o.layer, o.treatments) for o in other.chosen}


def _in_terms_of(allocation: Allocation, table: OptionTable) -> Allocation:
    """`allocation` with the damages that `table` gives its options."""
    damages = {(o.layer, o.treatments): o.damage for o in table.options}
    chosen = tuple(replace(o, damage=damages[(o.layer, o.treatments)]) for o in allocation.chosen)
    return replace(allocation, chosen=chosen, damage=sum(o.damage for o in chosen), bound=None)
