"""The best sub-network of each size, by evolution over blocks and widths."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from layerwright.allocate._designs import Choice
from layerwright.allocate.evolve_surrogate import evolve
from layerwright.core.errors import BudgetError, InputError
from layerwright.nn.subnet import SubnetConfig, SubnetSpace

__all__ = ["FoundSubnet", "search_subnets"]

_LEFT_OUT = 0
"""The candidate of a block that does not run; the others are the widths, ascending."""


@dataclass(frozen=True)
class FoundSubnet:
    """The best sub-network under a budget.

    Attributes:
        config: its blocks and widths.
        loss: as `loss_fn` says.
        cost: as `cost_fn` says, at most `budget`.
        budget: the limit.
    """

    config: SubnetConfig
    loss: float
    cost: float
    budget: float


@dataclass(frozen=True)
class _Width:
    """What a block may become: left out, or run with a width."""

    width: int

    @property
    def macs(self) -> float:
        return float(self.width)

    @property
    def params(self) -> float:
        return float(self.width)

    @property
    def code(self) -> tuple[float, float]:
        return float(self.width > 0), float(self.width)


def search_subnets(
    space: SubnetSpace,
    loss_fn: Callable[[SubnetConfig], float],
    cost_fn: Callable[[SubnetConfig], float],
    budgets: Sequence[float],
    *,
    population: int = 16,
    parents: int = 6,
    mutate: float = 0.25,
    generations: int = 8,
    start: Sequence[SubnetConfig] = (),
    seed: int = 0,
) -> list[FoundSubnet]:
    """The sub-network of least loss under each budget, by `evolve` over which blocks run and how wide they are.

    Each sub-network is measured once, whatever the number of budgets it is looked at for; what was found under a smaller
    budget joins the search under the next one, so that a larger budget never does worse. Source: Cai et al. (2020),
    Once-for-All, arXiv 1908.09791; Shangguan et al. (2023), TODM, arXiv 2309.01947.

    Args:
        space: the sub-networks.
        loss_fn: validation loss of one, 0 or more; slow.
        cost_fn: its size, such as ``Supernet.parameter_count``.
        budgets: highest costs.
        population, parents, mutate, generations: see `evolve`.
        start: sub-networks that join the first generation, where they fit.
        seed: of everything random.

    Returns:
        One for each of `budgets`, in their order.

    Raises:
        InputError: no budgets, a setting out of range, a loss that is negative or not finite.
        BudgetError: a budget below the smallest sub-network.
    """
    if not budgets or not all(math.isfinite(budget) and budget > 0 for budget in budgets):
        raise InputError(f"budgets: got {list(budgets)}, expected positive numbers")
    for config in start:
        space.check(config)
    widths = sorted(space.widths)
    price, loss = cache(cost_fn), cache(loss_fn)
    dearest = price(space.max())
    least = min(price(space.evenly(min(space.depths), width)) for width in widths)
    if min(budgets) < least:
        raise BudgetError(f"budgets: got {min(budgets):.6g}, below the smallest sub-network, {least:.6g}")
    candidates: Mapping[str, list[_Width]] = {
        f"block {block}": [_Width(0), *(_Width(width) for width in widths)] for block in range(space.blocks)
    }

    def decode(choice: Choice) -> SubnetConfig:
        kept = [block for block, index in enumerate(choice) if index != _LEFT_OUT]
        return SubnetConfig(tuple(kept), tuple(widths[choice[block] - 1] for block in kept))

    def encode(config: SubnetConfig) -> Choice:
        chosen = dict(zip(config.keep, config.widths, strict=True))
        return tuple(1 + widths.index(chosen[b]) if b in chosen else _LEFT_OUT for b in range(space.blocks))

    def cost(choice: Choice) -> float:
        depth = sum(index != _LEFT_OUT for index in choice)
        if depth in space.depths:
            return float(price(decode(choice)))
        # Not one of the space: dearer than all of it, and the more so the farther off, which leads the way back.
        return (2 + min(abs(depth - other) for other in space.depths)) * max(dearest, *budgets)

    def quality(choice: Choice, _batch: int) -> float:
        value = float(loss(decode(choice)))
        if not (math.isfinite(value) and value >= 0):
            raise InputError(f"loss_fn: got {value} for {decode(choice)}, expected a finite loss of 0 or more")
        return 1 / (1 + value)

    known = [encode(config) for config in (*start, space.min(), space.max())]
    found: dict[float, FoundSubnet] = {}
    for budget in sorted(set(budgets)):
        settings = {"population": population, "parents": parents, "mutate": mutate, "generations": generations}
        best = evolve(candidates, quality, cost, budget, floor=0.0, start=known, seed=seed, **settings)  # type: ignore[arg-type]
        choice = tuple(best.choice.values())
        known.append(choice)
        config = decode(choice)
        found[budget] = FoundSubnet(config, float(loss(config)), float(price(config)), budget)
    return [found[budget] for budget in budgets]
