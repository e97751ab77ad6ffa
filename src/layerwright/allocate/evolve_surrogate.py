"""Evolution with a noisy quality and a slow cost: parents are measured again, predicted costs are verified."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from layerwright.allocate._designs import Candidate, Choice, Judge, Space, features_of
from layerwright.allocate.forest import CostPredictor
from layerwright.allocate.tree import Floats, Integers
from layerwright.core.errors import BudgetError, InputError

__all__ = ["Candidate", "Choice", "Evolved", "Generation", "evolve", "features_of"]

_BLOCK = 4
"""Children that are proposed at once, in multiples of those that are missing."""
_LEAST = 32
"""And at least so many: a prediction takes as long for one as for these."""


@dataclass(frozen=True)
class Generation:
    """What one generation came to: its best design that keeps to the target, and how good the prediction was."""

    accuracy: float
    cost: float
    false: int
    evaluations: int


@dataclass(frozen=True)
class Evolved:
    """The outcome of `evolve`.

    Attributes:
        choice: layer to the position of its candidate.
        accuracy: mean over all batches.
        cost: as `cost_fn` says, at most the target.
        evaluations: calls of `cost_fn` on distinct designs.
        history: generation by generation.
        designs: features and true costs of all designs that were priced.
    """

    choice: Mapping[str, int]
    accuracy: float
    cost: float
    evaluations: int
    history: tuple[Generation, ...] = ()
    designs: tuple[Floats, Floats] = field(default=(np.empty((0, 0)), np.empty(0)), repr=False, compare=False)


def evolve(
    candidates: Mapping[str, Sequence[Candidate]],
    accuracy_fn: Callable[[Choice, int], float],
    cost_fn: Callable[[Choice], float],
    target: float,
    *,
    predictor: CostPredictor | None = None,
    population: int = 100,
    parents: int = 25,
    mutate: float = 0.2,
    generations: int = 500,
    warmup: int = 3,
    batches: int = 1,
    aim: float = 0.65,
    margin: float = 0.0,
    macs_limit: float = math.inf,
    fixed: tuple[float, float] = (0.0, 0.0),
    floor: float = 0.05,
    patience: int = 50,
    start: Sequence[Choice] = (),
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> Evolved:
    """The most accurate choice of candidates whose cost keeps to `target`.

    Every generation measures its parents again on the next batch (no stale luck), and adds as many children, half of
    them mutants and half crossed, that keep to `macs_limit`, `target` and `floor`. In the first `warmup` generations
    costs are those of `cost_fn`; then `predictor` says which children to measure, and the leading designs are priced
    truly until one keeps to the target: those before it are thrown out. It is fitted again after each generation in
    which it was wrong or a fiftieth more designs were priced. The leaders of all generations are measured on all
    batches in the end. Memory: `population` choices, and one number for each measurement. Source: Yu and Bouganis
    (2023), Mixed-TD.

    Args:
        candidates: layer to what it may become.
        accuracy_fn: ``accuracy(choice, batch number)``, 0 to 1.
        cost_fn: the true cost of a choice; slow, where a predictor is given.
        target: highest cost.
        predictor: learns costs from the features of `features_of`; None prices every design truly.
        population, parents: designs of the first generation and children of each other one; survivors of each.
        mutate: probability that a layer of a mutant is drawn anew.
        generations, warmup: how many, and how many of them before the predictor is used.
        batches: number of batches that `accuracy_fn` knows.
        aim, margin: the first designs are drawn with multiplications around ``aim - margin`` of each layer's largest.
        macs_limit: highest number of multiply-adds; a cheap check that comes first.
        fixed: multiply-adds and weights of everything that is not chosen.
        floor: lowest accuracy of a child.
        patience: proposals per missing child before a generation goes on with fewer.
        start: choices that join the first generation, where they keep to the limits.
        seed: of everything random.
        progress: called after every generation.

    Raises:
        InputError: a layer without candidates, a setting out of range, an accuracy or a cost that is not finite.
        BudgetError: a target below the smallest cost that was found.
    """
    if not 0 < parents <= population or not 0 <= mutate <= 1 or generations < 1 or batches < 1 or warmup < 1:
        raise InputError(
            f"evolve: got population={population}, parents={parents}, mutate={mutate}, generations={generations}, "
            f"warmup={warmup}, batches={batches}; expected parents up to population, mutate from 0 to 1, others above 0"
        )
    space = Space.of(candidates, fixed)
    judge = Judge(space, accuracy_fn, cost_fn, batches)
    random = np.random.default_rng(seed)
    safe = _reachable(judge, target, macs_limit)
    draw = space.around(aim - margin)
    pool = [choice for choice in (safe, *start) if _fits(judge, choice, target, macs_limit)]
    leaders: dict[Choice, None] = {safe: None}
    history: list[Generation] = []
    fitted: CostPredictor | None = None
    learned = 0
    kept: list[Choice] = []
    for number in range(generations):
        batch = number % batches
        # Prices come before accuracies here: what they cost is less than a forward.
        affordable = partial(_affordable, judge, fitted, target, macs_limit)
        accurate = partial(_accurate, judge, batch, floor)
        if number == 0:
            sample = partial(space.draw, probability=draw, random=random)
            children = _gather(sample, affordable, accurate, population, patience, pool)
        else:
            half, family = population // 2, np.array(kept, dtype=np.intp)
            mutants = partial(space.mutants, family, rate=mutate, random=random)
            crossed = partial(space.crossed, family, random=random)
            children = _gather(mutants, affordable, accurate, half, patience, kept)
            children = _gather(crossed, affordable, accurate, population - half, patience, children)
        everyone = sorted(dict.fromkeys([*pool, *children]), key=lambda c: (-judge.accuracy(c, batch), c))
        leader, false = safe, 0
        for leader in everyone:
            if judge.cost(leader) <= target:
                break
            false += 1
        else:
            leader = safe
        everyone = everyone[false:] or [safe]
        leaders[leader] = None
        kept = pool = everyone[:parents]
        history.append(Generation(judge.accuracy(leader, batch), judge.cost(leader), false, len(judge.costs)))
        # A leader that proved affordable as predicted tells next to nothing: one in fifty more, or a false one, does.
        news = len(judge.costs) - learned
        if predictor is not None and number + 1 >= warmup and (news > learned // 50 or (false and news)):
            predictor.fit(*judge.designs())
            fitted, learned = predictor, len(judge.costs)
        if progress:
            progress("evolving", number + 1, generations)
    best = max(leaders, key=lambda c: (judge.mean_accuracy(c), -judge.cost(c)))
    chosen = dict(zip(candidates, best, strict=True))
    return Evolved(
        chosen, judge.mean_accuracy(best), judge.cost(best), len(judge.costs), tuple(history), judge.designs()
    )


def _affordable(
    judge: Judge, fitted: CostPredictor | None, target: float, macs_limit: float, rows: Integers
) -> list[Choice]:
    """Those of `rows` that keep to the limits, as far as is known, in order."""
    good = rows[judge.space.macs(rows) <= macs_limit]
    if fitted is None:
        return [choice for choice in _choices(good) if judge.cost(choice) <= target]
    return _choices(good[fitted.predict(judge.space.features(good)) <= target]) if len(good) else []


def _accurate(judge: Judge, batch: int, floor: float, choice: Choice) -> bool:
    return judge.accuracy(choice, batch) >= floor


def _choices(rows: Integers) -> list[Choice]:
    return [tuple(row) for row in rows.tolist()]


def _fits(judge: Judge, choice: Choice, target: float, macs_limit: float) -> bool:
    return judge.cost(choice) <= target and float(judge.space.macs(np.array([choice]))[0]) <= macs_limit


def _gather(
    propose: Callable[[int], Integers],
    affordable: Callable[[Integers], list[Choice]],
    accurate: Callable[[Choice], bool],
    wanted: int,
    patience: int,
    known: Sequence[Choice],
) -> list[Choice]:
    """`known` and up to `wanted` more choices that pass both checks; fewer where proposals run out."""
    found = dict.fromkeys(known)
    refused: set[Choice] = set()
    goal, left = len(found) + wanted, patience * wanted
    while len(found) < goal and left > 0:
        rows = propose(min(max(_BLOCK * (goal - len(found)), _LEAST), left))
        left -= len(rows)
        for choice in affordable(rows):
            if len(found) == goal:
                break
            if choice not in found and choice not in refused:
                if accurate(choice):
                    found[choice] = None
                else:
                    refused.add(choice)
    return list(found)


def _reachable(judge: Judge, target: float, macs_limit: float) -> Choice:
    """A choice that keeps to target and limit: the fewest multiplications or weights, made cheaper layer by layer.

    Raises:
        BudgetError: none was found.
    """
    space = judge.space
    least = float(space.macs(np.array([space.least(0)]))[0])
    if least > macs_limit:
        raise BudgetError(f"macs: the limit {macs_limit:,.0f} is below the smallest reachable number, {least:,.0f}")
    starts = [c for c in (space.least(0), space.least(1)) if space.macs(np.array([c]))[0] <= macs_limit]
    best = min(starts, key=judge.cost)
    for row in range(len(space.sizes)) if judge.cost(best) > target else ():
        others = [(*best[:row], i, *best[row + 1 :]) for i in range(int(space.sizes[row]))]
        fitting = [c for c in others if space.macs(np.array([c]))[0] <= macs_limit]
        best = min([best, *fitting], key=judge.cost)
    if judge.cost(best) > target:
        raise BudgetError(
            f"target: {target:.6g} is below the smallest cost that was found, {judge.cost(best):.6g}; "
            "raise it, or offer smaller candidates"
        )
    return best
