from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest

from layerwright.allocate.evolve_surrogate import Choice, evolve, features_of
from layerwright.allocate.forest import CostForest
from layerwright.allocate.tree import Floats
from layerwright.core.errors import BudgetError, InputError


@dataclass(frozen=True)
class Item:
    macs: float
    params: float
    code: tuple[float, ...]


CANDIDATES = {
    f"layer{i}": [Item(10.0 * (k + 1), 5.0 * (k + 1), (float(k), i * 1.0)) for k in range(5)] for i in range(5)
}
VALUE = np.random.default_rng(0).random((5, 5)).cumsum(1)


def accuracy(choice: Choice, batch: int) -> float:
    noise = 0.02 * math.sin(17 * batch + sum((i + 1) * c for i, c in enumerate(choice)))
    return float(0.1 + 0.8 * VALUE[range(5), list(choice)].sum() / VALUE[:, -1].sum() + noise)


def cost(choice: Choice) -> float:
    # Not a sum: a pipeline waits for its slowest layer.
    return max((i + 1) * (c + 1) for i, c in enumerate(choice)) + 0.1 * sum(choice)


def best(target: float) -> float:
    every = (c for c in itertools.product(range(5), repeat=5) if cost(c) <= target)
    return max(sum(accuracy(c, b) for b in range(3)) / 3 for c in every)


@pytest.mark.parametrize("predictor", [None, "forest"])
@pytest.mark.parametrize("target", [8.0, 12.0])
def test_close_to_the_best_and_truly_below_the_target(predictor: str | None, target: float) -> None:
    forest = CostForest(20) if predictor else None
    found = evolve(CANDIDATES, accuracy, cost, target, predictor=forest, population=40, parents=10, generations=12,
                   batches=3, aim=0.6)  # fmt: skip
    assert cost(tuple(found.choice.values())) == found.cost <= target
    assert found.accuracy >= best(target) - 0.03
    assert len(found.history) == 12 and all(g.cost <= target for g in found.history)


def test_a_predictor_saves_prices_and_its_errors_are_thrown_out() -> None:
    calls: list[Choice] = []

    def counted(choice: Choice) -> float:
        calls.append(choice)
        return cost(choice)

    class Hopeful:
        def fit(self, features: Floats, costs: Floats) -> None:
            assert len(features) == len(costs)

        def predict(self, features: Floats) -> Floats:
            return np.zeros(len(features))

    plain = evolve(CANDIDATES, accuracy, cost, 9.0, population=30, parents=8, generations=12, batches=3)
    found = evolve(CANDIDATES, accuracy, counted, 9.0, predictor=Hopeful(), population=30, parents=8, generations=12,
                   batches=3)  # fmt: skip
    assert found.cost <= 9.0 and sum(g.false for g in found.history) > 0
    assert len(calls) == len(set(calls)) == found.evaluations < plain.evaluations


def test_parents_are_measured_again() -> None:
    asked: list[tuple[Choice, int]] = []

    def lucky(choice: Choice, batch: int) -> float:
        asked.append((choice, batch))
        # One batch flatters a poor design.
        return 0.99 if batch == 0 and choice == (0, 0, 0, 0, 0) else accuracy(choice, batch)

    found = evolve(CANDIDATES, lucky, cost, 12.0, population=30, parents=8, generations=9, batches=3)
    assert tuple(found.choice.values()) != (0, 0, 0, 0, 0)
    assert {batch for _, batch in asked} == {0, 1, 2} and len(asked) == len(set(asked))


def test_same_seed_same_choice() -> None:
    one, two = (
        evolve(CANDIDATES, accuracy, cost, 9.0, population=20, parents=5, generations=5, seed=4) for _ in range(2)
    )
    assert one == two


def test_cheap_limits_and_floor() -> None:
    found = evolve(CANDIDATES, accuracy, cost, 20.0, population=20, parents=5, generations=5, macs_limit=120.0)
    assert sum(CANDIDATES[name][i].macs for name, i in found.choice.items()) <= 120
    costs = features_of(CANDIDATES, [(0, 1, 2, 3, 4)], (7.0, 3.0))
    assert costs.shape == (1, 12) and costs[0, -2:].tolist() == [157.0, 78.0]


def test_forest_predicts_unseen_designs() -> None:
    random = np.random.default_rng(0)
    every = [tuple(row) for row in random.integers(0, 5, (400, 5)).tolist()]
    features, costs = features_of(CANDIDATES, every), np.array([cost(c) for c in every])
    forest = CostForest(100)
    forest.fit(features[:300], costs[:300])
    ranks = [np.argsort(np.argsort(values)) for values in (forest.predict(features[300:]), costs[300:])]
    assert np.corrcoef(ranks[0], ranks[1])[0, 1] > 0.8
    assert forest.out_of_bag is not None and forest.out_of_bag > 0.5


def test_forest_predicts_as_scikit_learn_does() -> None:
    random = np.random.default_rng(1)
    features, costs = random.normal(size=(60, 4)), 1 + random.random(60)
    forest = CostForest(20)
    forest.fit(features, costs)
    assert np.allclose(forest.predict(features), 1 / forest._forest.predict(features), rtol=1e-12)


def test_predictor_learns_again_when_it_was_wrong() -> None:
    seen: list[int] = []

    class Hopeful:
        def fit(self, features: Floats, costs: Floats) -> None:
            seen.append(len(features))

        def predict(self, features: Floats) -> Floats:
            return np.zeros(len(features))

    found = evolve(CANDIDATES, accuracy, cost, 9.0, predictor=Hopeful(), population=30, parents=8, generations=12,
                   batches=3)  # fmt: skip
    false = [g.evaluations for g in found.history[2:] if g.false]
    # Right after warm-up, and after every generation whose leaders proved too dear.
    assert false and set(false) <= set(seen) and seen[0] == found.history[2].evaluations
    assert seen == sorted(set(seen))


def test_bad_input() -> None:
    with pytest.raises(InputError, match="accuracy_fn: got nan for layer0="):
        evolve(CANDIDATES, lambda _c, _b: float("nan"), cost, 9.0, population=4, parents=2, generations=1)
    with pytest.raises(InputError, match="cost_fn: got inf"):
        evolve(CANDIDATES, accuracy, lambda _c: float("inf"), 9.0, population=4, parents=2, generations=1)
    with pytest.raises(BudgetError, match=r"target: 4 is below .* 5"):
        evolve(CANDIDATES, accuracy, cost, 4.0, population=4, parents=2, generations=1)
    with pytest.raises(BudgetError, match="macs"):
        evolve(CANDIDATES, accuracy, cost, 9.0, population=4, parents=2, generations=1, macs_limit=20.0)
    with pytest.raises(InputError, match="layer9: no candidates"):
        evolve({**CANDIDATES, "layer9": []}, accuracy, cost, 9.0)
    with pytest.raises(InputError, match="got none"):
        evolve({}, accuracy, cost, 9.0)
    with pytest.raises(InputError, match="codes"):
        evolve({"a": [Item(1, 1, (1.0,)), Item(1, 1, (1.0, 2.0))]}, accuracy, cost, 9.0)
    for settings in ({"parents": 0}, {"mutate": 1.5}, {"generations": 0}, {"batches": 0}, {"warmup": 0}):
        with pytest.raises(InputError, match="evolve"):
            evolve(CANDIDATES, accuracy, cost, 9.0, **settings)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="fit it"):
        CostForest(3).predict(np.zeros((1, 2)))
    with pytest.raises(InputError, match="costs"):
        CostForest(3).fit(np.zeros((2, 2)), np.array([1.0, 0.0]))
    with pytest.raises(InputError, match="trees"):
        CostForest(0)
