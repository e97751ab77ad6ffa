"""Efficient Architecture Search (Cai et al., 2017, arXiv 1707.04873): grow a trained network, learn where.

A small network on the digits grows in episodes; a controller, or chance, says where. Each candidate is trained briefly
from what it inherits, and once more from first weights.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from layerwright.allocate.controller import Candidate, MetaController, PlainSpace, search
from layerwright.core.evidence import Check, Evidence
from layerwright.models import PlainCNN, from_spec
from layerwright.recipes._classifier import Images, accuracy, digits_images, train_network_
from layerwright.recipes.grow import GrowResult, grow_search

__all__ = ["CLAIM", "run"]

CLAIM = (
    "Candidates that grow from a trained network inherit its function, so that a few epochs suffice to judge them and "
    "the best one beats the start; a controller that learns by REINFORCE from their words finds better ones with time."
)
START = ("conv-3-3", "conv-3-3", "pool", "conv-6-3", "fc-8")
FAKE_START = ("conv-8-3", "conv-8-3", "pool", "conv-16-3", "fc-16")
FAKE_SPACE = PlainSpace((8, 16, 24, 32), (16, 32, 48), (1, 3, 5), max_blocks=2, max_layers=6)
DEPTH_PENALTY = 0.05
ACTIONS = 2
Progress = Callable[[str, int, int], None]


def run(quick: bool = False, seeds: int = 3, progress: Progress | None = None) -> Evidence:
    """Measure the claims; see `layerwright.studies.run_study`."""
    begun = time.perf_counter()
    tell = progress or (lambda _what, _done, _total: None)
    table: list[dict[str, Any]] = []
    gains: list[float] = []
    inherited: list[float] = []
    start_epochs, epochs, episodes, batch = (6, 2, 1, 3) if quick else (15, 4, 6, 6)
    for seed in range(seeds):
        data = digits_images(seed)
        start = _network(START, seed)
        train_network_(start, data.train, epochs=start_epochs, seed=seed)
        before = accuracy(start, data.test)
        table.append(_row("start", seed, START, accuracy(start, data.validation), before))
        longer = copy.deepcopy(start)
        train_network_(longer, data.train, epochs=epochs, seed=seed)
        scores = accuracy(longer, data.validation), accuracy(longer, data.test)
        table.append(_row(f"start, {epochs} epochs more", seed, START, *scores))
        for learn in (True, False):
            found = grow_search(
                start,
                data,
                episodes=episodes,
                batch=batch,
                wider=ACTIONS,
                deeper=ACTIONS,
                epochs=epochs,
                seed=seed,
                learn=learn,
                progress=progress,
            )
            name = "found by the controller" if learn else "found at random"
            after = accuracy(found.network, data.test)
            table.append(_row(name, seed, found.best.spec, found.validation, after))
            if learn:
                gains.append(after - before)
                scratch = _from_scratch(found, data, epochs, seed, tell)
                inherited.append(statistics.fmean(found.pool[key] - value for key, value in scratch.items()))
                mean = statistics.fmean(scratch.values())
                table.append({"network": f"mean of {len(scratch)} from scratch", "seed": seed, "validation": mean})
                grown = statistics.fmean(found.pool[key] for key in scratch)
                table.append({"network": "mean of them, inherited", "seed": seed, "validation": grown})
    learned, rose = _fake(True, seeds, quick)
    chance, flat = _fake(False, seeds, quick)
    table += [
        {"network": f"fake reward, {name}", "first": first, "last": last}
        for name, (first, last) in (("controller", learned), ("random", chance))
    ]
    checks = (
        Check(
            f"validation accuracy after {epochs} epochs, inherited - from scratch",
            statistics.fmean(inherited),
            0.03,
            ">=",
        ),
        Check("test accuracy, best found - start", statistics.fmean(gains), 0.005, ">="),
        Check("fake reward of the last five episodes - the first five, controller", rose, 0.1, ">="),
        Check("the same at random, size of the change", abs(flat), 0.03),
    )
    notes = [
        f"digits of 8 x 8: 1200 to train on, 300 to choose by, 297 to report; start {','.join(START)}. With 8 and 16 "
        "filters the start finds 98 % already, and 297 digits do not tell more from luck",
        f"{episodes} episodes of {batch} networks, {ACTIONS} times wider and {ACTIONS} layers more each",
        "fake reward: log parameters, 0 for the start and 1 for all layers widened twice, less "
        f"{DEPTH_PENALTY} for each layer more; {_fake_episodes(quick)} episodes of 10",
    ]
    seconds = time.perf_counter() - begun
    return Evidence("eas", CLAIM, table, checks, seconds, tuple(range(seeds)), notes)


def _network(spec: Sequence[str], seed: int) -> PlainCNN:
    network = from_spec(spec, generator=torch.Generator().manual_seed(seed))
    assert isinstance(network, PlainCNN)
    return network


def _row(name: str, seed: int, spec: Sequence[str], validation: float, test: float) -> dict[str, Any]:
    return {
        "network": name,
        "seed": seed,
        "layers": ",".join(spec),
        "parameters": PlainCNN.count_parameters(spec),
        "validation": validation,
        "test": test,
    }


def _from_scratch(found: GrowResult, data: Images, epochs: int, seed: int, tell: Progress) -> dict[str, float]:
    """Validation accuracy of every candidate when trained as briefly, but from first weights."""
    candidates = {c.key: c for episode in found.episodes for c in episode.candidates if c.actions}
    values: dict[str, float] = {}
    for number, (key, candidate) in enumerate(candidates.items()):
        network = _network(candidate.spec, seed + 1000 * number)
        train_network_(network, data.train, epochs=epochs, seed=seed)
        values[key] = accuracy(network, data.validation)
        tell("training from scratch", number + 1, len(candidates))
    return values


def _fake_episodes(quick: bool) -> int:
    return 15 if quick else 40


def _fake(learn: bool, seeds: int, quick: bool) -> tuple[tuple[float, float], float]:
    """Mean fake reward of the first and of the last five episodes, and the change."""
    means: list[tuple[float, float]] = []
    for seed in range(seeds):
        controller = MetaController(FAKE_SPACE, steps=20, seed=seed)
        episodes = list(
            search(
                controller,
                FAKE_START,
                fake_rewards,
                episodes=_fake_episodes(quick),
                batch=10,
                wider=ACTIONS,
                deeper=ACTIONS,
                seed=seed,
                learn=learn,
                value=float,
            )
        )
        scores = [episode.mean for episode in episodes]
        means.append((statistics.fmean(scores[:5]), statistics.fmean(scores[-5:])))
    first, last = (statistics.fmean(part) for part in zip(*means, strict=True))
    return (first, last), last - first


def fake_rewards(candidates: Sequence[Candidate]) -> list[float]:
    """Log parameters between those of the start (0) and of all layers widened twice (1), less a penalty for depth."""
    low = math.log(PlainCNN.count_parameters(FAKE_START))
    largest = list(FAKE_START)
    for _ in range(ACTIONS):
        largest = [FAKE_SPACE.wider(word) if word != "pool" else word for word in largest]
    high = math.log(PlainCNN.count_parameters(largest))
    return [
        (math.log(PlainCNN.count_parameters(c.spec)) - low) / (high - low)
        - DEPTH_PENALTY * (len(c.spec) - len(FAKE_START))
        for c in candidates
    ]
