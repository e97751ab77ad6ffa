"""Random, mutated and crossed proxies, and the probabilities with which operations are drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from layerwright.core.errors import InputError
from layerwright.score.proxies.expression import _TREE, ProxyTree, Step, Structure
from layerwright.score.proxies.operations import BINARY, UNARY, arity

__all__ = ["OperationOdds", "crossover", "distance", "mutate", "random_proxy"]

CHAIN = 4
"""Operations of a linear proxy."""

GRAPH = 5
"""Operations of a graph: as many as a branched tree has."""


@dataclass
class OperationOdds:
    """Operation sampling prioritisation: how likely each operation is drawn.

    A weight moves towards the share of valid proxies among those that hold the operation, ``w <- .9 w + .1 success``,
    and never falls below `floor`.
    """

    weights: dict[str, float]
    floor: float = 0.05
    rate: float = 0.1

    @classmethod
    def uniform(cls) -> OperationOdds:
        """All operations alike."""
        return cls(dict.fromkeys(sorted([*UNARY, *BINARY]), 0.5))

    def draw(self, operands: int, random: np.random.Generator) -> str:
        """An operation of that many operands."""
        names = sorted(UNARY if operands == 1 else BINARY)
        odds = np.array([self.weights[name] for name in names])
        return names[int(random.choice(len(names), p=odds / odds.sum()))]

    def reward_(self, proxy: ProxyTree, success: bool) -> None:
        """Count one evaluated proxy."""
        for name in {name for name, _ in proxy.steps}:
            moved = (1 - self.rate) * self.weights[name] + self.rate * success
            self.weights[name] = max(moved, self.floor)


def random_proxy(
    structure: Structure, inputs: Sequence[str], random: np.random.Generator, odds: OperationOdds | None = None
) -> ProxyTree:
    """A proxy of that structure over statistics drawn from `inputs`.

    Raises:
        InputError: no inputs.
    """
    if not inputs:
        raise InputError("inputs: got none, expected names of statistics such as G and W")
    odds = odds or OperationOdds.uniform()
    count = 1 if structure == "linear" else 2
    chosen = tuple(str(random.choice(list(inputs))) for _ in range(count))
    if structure == "dag":
        steps: list[Step] = []
        for number in range(GRAPH):
            # The last step joins two nodes, so that more than a chain can stand behind the result.
            operands = 2 if number == GRAPH - 1 else int(random.integers(1, 3))
            steps.append((odds.draw(operands, random), _sources(operands, count + number, random)))
        return ProxyTree(structure, chosen, tuple(steps))
    wiring = _TREE if structure == "tree" else tuple((number,) for number in range(CHAIN))
    return ProxyTree(structure, chosen, tuple((odds.draw(len(sources), random), sources) for sources in wiring))


def _sources(operands: int, nodes: int, random: np.random.Generator) -> tuple[int, ...]:
    # The newest node is always read: unread nodes would be lost work.
    return (nodes - 1, *(int(random.integers(nodes - 1)) for _ in range(operands - 1)))


def mutate(
    proxy: ProxyTree, inputs: Sequence[str], random: np.random.Generator, odds: OperationOdds | None = None
) -> ProxyTree:
    """`proxy` with one input or one operation drawn anew; an operation keeps its number of operands."""
    odds = odds or OperationOdds.uniform()
    slot = int(random.integers(len(proxy.inputs) + len(proxy.steps)))
    if slot < len(proxy.inputs):
        drawn = str(random.choice(list(inputs)))
        return ProxyTree(proxy.structure, _with(proxy.inputs, slot, drawn), proxy.steps)
    slot -= len(proxy.inputs)
    name, sources = proxy.steps[slot]
    step: Step = (odds.draw(arity(name), random), sources)
    return ProxyTree(proxy.structure, proxy.inputs, (*proxy.steps[:slot], step, *proxy.steps[slot + 1 :]))


def _with(values: tuple[str, ...], slot: int, value: str) -> tuple[str, ...]:
    return (*values[:slot], value, *values[slot + 1 :])


def crossover(first: ProxyTree, second: ProxyTree, random: np.random.Generator) -> ProxyTree:
    """Each input and each operation (with what it reads) from either parent, position by position.

    Parents of different sizes or structures do not cross: the first is returned.
    """
    if first.structure != second.structure or len(first.steps) != len(second.steps):
        return first
    if len(first.inputs) != len(second.inputs):
        return first
    pick = random.random(len(first.inputs) + len(first.steps)) < 0.5
    inputs = tuple(a if p else b for a, b, p in zip(first.inputs, second.inputs, pick, strict=False))
    later = pick[len(first.inputs) :]
    steps = tuple(a if p else b for a, b, p in zip(first.steps, second.steps, later, strict=True))
    return ProxyTree(first.structure, inputs, steps)


def distance(first: ProxyTree, second: ProxyTree) -> int:
    """Number of positions at which two genotypes differ."""
    pairs = [*zip(first.inputs, second.inputs, strict=False), *zip(first.steps, second.steps, strict=False)]
    missing = abs(len(first.inputs) - len(second.inputs)) + abs(len(first.steps) - len(second.steps))
    return missing + sum(a != b for a, b in pairs)


def odds_from_data(data: Mapping[str, float]) -> OperationOdds:
    """Saved odds; operations that are new since then start even."""
    return OperationOdds({**OperationOdds.uniform().weights, **{k: float(v) for k, v in data.items()}})
