"""Choices among candidates as arrays, and what is known of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from layerwright.allocate.tree import Floats, Integers
from layerwright.core.errors import InputError

__all__ = ["Candidate", "Choice", "Judge", "Space", "features_of"]

Choice = tuple[int, ...]
"""Which candidate each layer gets, in the order of the layers."""


class Candidate(Protocol):
    """What a layer may become."""

    @property
    def macs(self) -> float:
        """Multiply-adds."""

    @property
    def params(self) -> float:
        """Weights."""

    @property
    def code(self) -> Sequence[float]:
        """Numbers that tell a predictor which one it is; as many for every candidate."""


def features_of(
    candidates: Mapping[str, Sequence[Candidate]], choices: Sequence[Choice], fixed: tuple[float, float] = (0.0, 0.0)
) -> Floats:
    """``(choices, features)``: the codes of all layers' candidates, then all multiply-adds and weights."""
    return Space.of(candidates, fixed).features(np.array(choices, dtype=np.intp))


@dataclass(frozen=True, eq=False)
class Space:
    """Candidates as arrays, padded to the layer with the most of them."""

    names: tuple[str, ...]
    sizes: Integers
    cost: Floats  # (layers, most, 2): multiply-adds and weights
    codes: Floats  # (layers, most, length of a code)
    fixed: tuple[float, float]

    @classmethod
    def of(cls, candidates: Mapping[str, Sequence[Candidate]], fixed: tuple[float, float]) -> Space:
        if not candidates:
            raise InputError("candidates: got none, expected at least one layer")
        for name, own in candidates.items():
            if not own:
                raise InputError(f"{name}: no candidates; give at least the layer as it is")
        sizes = np.array([len(own) for own in candidates.values()])
        length = {len(c.code) for own in candidates.values() for c in own}
        if len(length) != 1:
            raise InputError(f"candidates: their codes have {sorted(length)} numbers, expected equally many")
        cost = np.full((len(sizes), int(sizes.max()), 2), np.inf)
        codes = np.zeros((len(sizes), int(sizes.max()), length.pop()))
        for row, own in enumerate(candidates.values()):
            cost[row, : len(own)] = [(c.macs, c.params) for c in own]
            codes[row, : len(own)] = [c.code for c in own]
        return cls(tuple(candidates), sizes, cost, codes, fixed)

    def _rows(self) -> Integers:
        return np.arange(len(self.sizes))

    def macs(self, choices: Integers) -> Floats:
        """Multiply-adds ``(choices,)``."""
        return np.asarray(self.cost[self._rows(), choices, 0].sum(1) + self.fixed[0])

    def features(self, choices: Integers) -> Floats:
        """See `features_of`."""
        totals = self.cost[self._rows(), choices].sum(1) + np.array(self.fixed)
        return np.concatenate([self.codes[self._rows(), choices].reshape(len(choices), -1), totals], 1)

    def least(self, column: int) -> Choice:
        """The candidates of fewest multiply-adds (0) or weights (1)."""
        return tuple(self.cost[:, :, column].argmin(1).tolist())

    def around(self, centre: float, spread: float = 0.15, width: float = 0.05) -> Floats:
        """``(layers, most)`` probabilities: a bin of the ratio of multiplications by a bell around `centre`, and a
        candidate of that bin evenly.
        """
        macs = self.cost[:, :, 0]
        valid = np.isfinite(macs)
        largest = np.where(valid, macs, 0).max(1, keepdims=True)
        bins = np.where(valid, np.floor(np.where(valid, macs, 0) / np.maximum(largest, 1) / width), -1).astype(int)
        weight = np.zeros(macs.shape)
        for row in range(len(macs)):
            own, where, count = np.unique(bins[row, valid[row]], return_inverse=True, return_counts=True)
            bell = np.exp(-0.5 * (((own + 0.5) * width - centre) / spread) ** 2) + 1e-12
            weight[row, valid[row]] = (bell / count)[where]
        return np.asarray(weight / weight.sum(1, keepdims=True))

    def draw(self, count: int, probability: Floats, random: np.random.Generator) -> Integers:
        """Random choices ``(count, layers)``."""
        edges = probability.cumsum(1)
        drawn = random.random((count, len(self.sizes), 1))
        return np.minimum((drawn > edges).sum(2), self.sizes - 1)

    def mutants(self, family: Integers, count: int, rate: float, random: np.random.Generator) -> Integers:
        """Children of one parent each, some layers drawn anew."""
        children = family[random.integers(0, len(family), count)]
        fresh = (random.random(children.shape) * self.sizes).astype(np.intp)
        return np.where(random.random(children.shape) < rate, fresh, children)

    def crossed(self, family: Integers, count: int, random: np.random.Generator) -> Integers:
        """Children of two parents each, layer by layer from either."""
        pairs = family[random.integers(0, len(family), (2, count))]
        return np.where(random.random(pairs.shape[1:]) < 0.5, pairs[0], pairs[1])


class Judge:
    """Accuracies and costs, each asked for once."""

    def __init__(
        self,
        space: Space,
        accuracy_fn: Callable[[Choice, int], float],
        cost_fn: Callable[[Choice], float],
        batches: int,
    ) -> None:
        self.space, self.batches = space, batches
        self._accuracy, self._cost = accuracy_fn, cost_fn
        self.accuracies: dict[tuple[Choice, int], float] = {}
        self.costs: dict[Choice, float] = {}

    def accuracy(self, choice: Choice, batch: int) -> float:
        key = (choice, batch)
        if key not in self.accuracies:
            value = float(self._accuracy(choice, batch))
            if not math.isfinite(value):
                raise InputError(f"accuracy_fn: got {value} for {self._describe(choice)}; expected a share of 0 to 1")
            self.accuracies[key] = value
        return self.accuracies[key]

    def mean_accuracy(self, choice: Choice) -> float:
        return sum(self.accuracy(choice, batch) for batch in range(self.batches)) / self.batches

    def cost(self, choice: Choice) -> float:
        if choice not in self.costs:
            value = float(self._cost(choice))
            if not math.isfinite(value):
                raise InputError(f"cost_fn: got {value} for {self._describe(choice)}; expected a finite cost")
            self.costs[choice] = value
        return self.costs[choice]

    def designs(self) -> tuple[Floats, Floats]:
        return self.space.features(np.array(list(self.costs), dtype=np.intp)), np.array(list(self.costs.values()))

    def _describe(self, choice: Choice) -> str:
        parts = [f"{name}={index}" for name, index in zip(self.space.names, choice, strict=True)]
        return ", ".join(parts[:4]) + (", ..." if len(parts) > 4 else "")
