"""Episodes: grow a batch of networks, judge them, learn."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from layerwright.allocate.controller.network import Decisions, MetaController
from layerwright.allocate.controller.space import Space
from layerwright.allocate.controller.value import Baseline, reward
from layerwright.core.errors import InputError

__all__ = ["Candidate", "Episode", "Insertion", "Widening", "search"]

Evaluate = Callable[[Sequence["Candidate"]], Sequence[float]]


@dataclass(frozen=True)
class Widening:
    """The layers at `positions` of a network's words, each to its next size; the first are widened first."""

    positions: tuple[int, ...]


@dataclass(frozen=True)
class Insertion:
    """A layer behind that at `position`, with a `kernel` size if it is a convolution."""

    position: int
    kernel: int | None = None


@dataclass(frozen=True)
class Candidate:
    """A network and how it grew from the start: the words after each action can be computed again from them."""

    spec: tuple[str, ...]
    actions: tuple[Widening | Insertion, ...] = ()

    @property
    def key(self) -> str:
        """The words in one string."""
        return "_".join(self.spec)


@dataclass(frozen=True)
class Episode:
    """What one episode tried.

    Attributes:
        number: from 0.
        candidates: the networks.
        scores: what each was judged to be: an accuracy, unless the values were given as rewards.
        baseline: after this episode.
    """

    number: int
    candidates: tuple[Candidate, ...]
    scores: tuple[float, ...]
    baseline: float

    @property
    def mean(self) -> float:
        """Mean score."""
        return statistics.fmean(self.scores)

    def to_data(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "episode": self.number,
            "mean": self.mean,
            "best": max(self.scores),
            "baseline": self.baseline,
            "networks": [candidate.key for candidate in self.candidates],
            "scores": list(self.scores),
        }


def search(
    controller: MetaController,
    start: Sequence[str],
    evaluate: Evaluate,
    *,
    episodes: int,
    batch: int = 10,
    wider: int = 4,
    deeper: int = 5,
    seed: int = 0,
    first: int = 0,
    learn: bool = True,
    baseline: Baseline | None = None,
    value: Callable[[float], float] = reward,
) -> Iterator[Episode]:
    """Grow `batch` copies of `start` in each episode, `wider` times wider and then `deeper` times deeper; then learn.

    Each episode draws from a seed of its own, so a search that goes on at `first` with the same controller and
    baseline decides as one that was never stopped.

    Args:
        controller: changed by learning.
        start: words of the first network.
        evaluate: ``evaluate(candidates) -> one score each``.
        episodes: number of the last one, plus 1.
        batch, wider, deeper: networks of an episode, and actions on each.
        seed: of the decisions.
        first: number of the first episode.
        learn: False draws every decision uniformly among those that are possible: random search.
        baseline: of the rewards; a new one if left out.
        value: what a score is worth; by default ``tan(accuracy pi / 2)``.

    Raises:
        InputError: a count below 1, no action at all, or words that the controller does not know.
    """
    if min(episodes, batch) < 1 or min(wider, deeper) < 0 or wider + deeper < 1:
        raise InputError(
            f"episodes, batch: got {episodes} and {batch}, expected at least 1; wider, deeper: got {wider} and {deeper}, "
            "expected at least one action"
        )
    controller.encode([start])  # words that are not known are refused before anything is judged
    return _episodes(
        controller, tuple(start), evaluate, range(first, episodes), batch, (wider, deeper), seed, learn,
        Baseline() if baseline is None else baseline, value,
    )  # fmt: skip


def _episodes(
    controller: MetaController,
    start: tuple[str, ...],
    evaluate: Evaluate,
    numbers: range,
    batch: int,
    actions: tuple[int, int],
    seed: int,
    learn: bool,
    baseline: Baseline,
    value: Callable[[float], float],
) -> Iterator[Episode]:
    for number in numbers:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        grown = [Candidate(start)] * batch
        controller.episode.clear()
        for kind in ["wider"] * actions[0] + ["deeper"] * actions[1]:
            grown = _act(controller, grown, kind, generator, learn)
        scores = tuple(float(score) for score in evaluate(grown))
        advantages = baseline.advantages([value(score) for score in scores])
        if learn:
            controller.update(advantages)
        yield Episode(number, tuple(grown), scores, baseline.value)


def _act(
    controller: MetaController, grown: Sequence[Candidate], kind: str, generator: torch.Generator, learn: bool
) -> list[Candidate]:
    specs = [candidate.spec for candidate in grown]
    if learn:
        made = controller.act_wider(specs, generator) if kind == "wider" else controller.act_deeper(specs, generator)
    else:
        made = _uniform(controller, specs, kind, generator)
    return [_applied(controller, candidate, made, row) for row, candidate in enumerate(grown)]


def _applied(controller: MetaController, candidate: Candidate, made: Decisions, row: int) -> Candidate:
    """The candidate after the decisions of one row."""
    space: Space = controller.space
    choice, mask, spec = made.choices[row], made.mask[row], list(candidate.spec)
    action: Widening | Insertion
    if made.kind == "wider":
        action = Widening(tuple(i for i in range(len(spec)) if bool(choice[i]) and bool(mask[i])))
        for position in action.positions:
            spec[position] = space.wider(spec[position])
        return Candidate(tuple(spec), (*candidate.actions, action)) if action.positions else candidate
    place = controller.position(spec, choice)
    if place is None:
        return candidate
    kernel = None
    if space.takes_kernel(spec[place]):
        kernel = space.kernels[int(choice[2])]  # type: ignore[attr-defined]
    action = Insertion(place, kernel)
    return Candidate(tuple(space.inserted(spec, place, kernel)), (*candidate.actions, action))


@torch.no_grad()
def _uniform(
    controller: MetaController, specs: Sequence[Sequence[str]], kind: str, generator: torch.Generator
) -> Decisions:
    """Decisions that no one learned: a coin for every layer, or any possible place with equal probability a step."""
    kept = tuple(tuple(spec) for spec in specs)
    choices: Tensor
    if kind == "wider":
        probability, mask = controller.wider_probabilities(specs)
        choices = (torch.rand(probability.shape, generator=generator) < 0.5) & mask
        return Decisions(kind, kept, choices.long(), mask)
    rows = []
    for spec in specs:
        row = [0] * len(controller.space.decisions)
        for step in range(len(row)):
            # With the steps before it chosen, the probabilities say what is possible.
            found, _, _ = controller.deeper_probabilities([spec], torch.tensor([row]))
            row[step] = int(torch.multinomial((found[step][0] > 0).float(), 1, generator=generator))
        rows.append(row)
    choices = torch.tensor(rows)
    _, _, mask = controller.deeper_probabilities(specs, choices)
    return Decisions(kind, kept, choices, mask)
