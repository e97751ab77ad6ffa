"""Choose the blocks to train one after the other, each time the one that helps most (SubTuning)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerwright.allocate.subset_evaluations import Evaluate, SubsetEvaluations, Told
from layerwright.core.block_paths import check_block_paths
from layerwright.core.errors import InputError

__all__ = ["BlockChoice", "GreedyRound", "check_greedy", "greedy_blocks"]

_DIGITS = 9
"""Means of the same runs in another order differ by rounding: closer than this is equal."""


@dataclass(frozen=True)
class GreedyRound:
    """One round.

    Attributes:
        candidates: accuracy with each block that was not chosen yet, in order.
        best: the block of the highest accuracy.
        accuracy: with it.
        gain: over the round before.
        taken: whether the gain exceeded the tolerance.
    """

    candidates: Mapping[str, float]
    best: str
    accuracy: float
    gain: float
    taken: bool

    def to_data(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "candidates": dict(self.candidates),
            "best": self.best,
            "accuracy": self.accuracy,
            "gain": self.gain,
            "taken": self.taken,
        }


@dataclass(frozen=True)
class BlockChoice:
    """The blocks to train.

    Attributes:
        keep: chosen blocks, in the order in which they were taken.
        accuracy: with them.
        baseline: accuracy that the first round had to beat.
        trace: all rounds.
        evaluations: sets that were evaluated here, those that were known already left out.
    """

    keep: tuple[str, ...]
    accuracy: float
    baseline: float
    trace: tuple[GreedyRound, ...]
    evaluations: int

    def to_data(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "blocks": list(self.keep),
            "accuracy": self.accuracy,
            "baseline": self.baseline,
            "trace": [step.to_data() for step in self.trace],
        }


def greedy_blocks(
    evaluate: Evaluate | SubsetEvaluations,
    blocks: Sequence[str],
    *,
    eps: float = 0.002,
    max_blocks: int | None = None,
    costs: Mapping[str, float] | None = None,
    baseline: float | None = None,
    parallel: int = 1,
    record: str | Path | None = None,
    progress: Told | None = None,
) -> BlockChoice:
    """Forward selection: add the best block as long as it raises the accuracy by more than `eps`.

    ``S = {}``; each round evaluates ``S + {u}`` for all u not in S and takes the best, if it beats the round before by
    more than `eps` (Kaplun et al., 2023, arXiv 2302.06354). Equal ones: the cheaper, then the earlier block. Rounds of
    k blocks cost about ``k * len(blocks)`` evaluations, which do not depend on each other within a round.

    Args:
        evaluate: accuracy of a set (see `SubsetEvaluations`), or evaluations that were begun elsewhere; then
            `parallel`, `record` and `progress` are theirs.
        blocks: what can be chosen, in the model's order.
        eps: tolerance, 0 or more; a larger one trains fewer blocks.
        max_blocks: how many at most, at least 1; None for no limit.
        costs: of each block, such as its parameters; without, ties go to the earlier block.
        baseline: accuracy to beat first; None evaluates the empty set (the readout alone), the paper's listing has 0.
        parallel: processes that evaluate.
        record: JSON file, written after each evaluation: a run that was stopped goes on from it.
        progress: ``progress(set and its accuracy, done in this round, total)``.

    Raises:
        InputError: a setting outside its range, overlapping blocks, or an evaluation that gives NaN.
    """
    names = check_block_paths(blocks)
    if not names:
        raise InputError("blocks: got none, expected at least one")
    check_greedy(eps, max_blocks)
    price = {name: float((costs or {}).get(name, 0.0)) for name in names}
    if isinstance(evaluate, SubsetEvaluations):
        return _select(evaluate, names, eps, max_blocks, price, baseline)
    with SubsetEvaluations(evaluate, names, path=record, workers=parallel, progress=progress) as evaluations:
        choice = _select(evaluations, names, eps, max_blocks, price, baseline)
        evaluations.write(**choice.to_data())
    return choice


def check_greedy(eps: float, max_blocks: int | None) -> None:
    """Raise `InputError` for a tolerance below 0 or a limit below 1."""
    if not eps >= 0:
        raise InputError(f"eps: got {eps}, expected 0 or more")
    if max_blocks is not None and max_blocks < 1:
        raise InputError(f"max_blocks: got {max_blocks}, expected at least 1")


def _select(
    evaluations: SubsetEvaluations,
    names: Sequence[str],
    eps: float,
    max_blocks: int | None,
    price: Mapping[str, float],
    baseline: float | None,
) -> BlockChoice:
    begun = evaluations.count
    start = evaluations([()])[0] if baseline is None else baseline
    chosen: list[str] = []
    trace: list[GreedyRound] = []
    accuracy = start
    while len(chosen) < (len(names) if max_blocks is None else min(max_blocks, len(names))):
        rest = [name for name in names if name not in chosen]
        values = evaluations([(*chosen, name) for name in rest], f"round {len(trace) + 1}, ")
        found = dict(zip(rest, values, strict=True))
        best = min(rest, key=lambda name: (-round(found[name], _DIGITS), price[name], names.index(name)))
        gain = found[best] - accuracy
        taken = round(gain - eps, _DIGITS) > 0
        trace.append(GreedyRound(found, best, found[best], gain, taken))
        if not taken:
            break
        chosen.append(best)
        accuracy = found[best]
    return BlockChoice(tuple(chosen), accuracy, start, tuple(trace), evaluations.count - begun)
