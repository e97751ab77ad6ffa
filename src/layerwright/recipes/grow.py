"""Search for a better network by growing a trained one: every candidate inherits its function."""

from __future__ import annotations

import copy
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layerwright.allocate.controller import (
    Baseline,
    Candidate,
    DenseSpace,
    Episode,
    Insertion,
    MetaController,
    PlainSpace,
    Space,
    search,
)
from layerwright.core.errors import InputError
from layerwright.models import (
    DenseNetBC,
    PlainCNN,
    deepen_dense_,
    widen_dense_,
    widen_transitions_,
)
from layerwright.recipes._classifier import Images, accuracy, train_network_
from layerwright.recipes._grow_state import GrowState, NetPool
from layerwright.treat.grow import deepen_, widen_

__all__ = ["GrowResult", "grow_search", "grown_network", "space_for"]

Network = PlainCNN | DenseNetBC
TrainFunction = Callable[[nn.Module, Images, int], None]
"""``train_fn(model, images, seed)``: trains `model` in place on the training part."""
Progress = Callable[[str, int, int], None]
WIDER_NOISE = 1e-2
DEEPER_NOISE = 1e-3


@dataclass(frozen=True)
class GrowResult:
    """What a search found.

    Attributes:
        network: the best by validation accuracy, in evaluation mode; the start if nothing is better.
        best: how it grew.
        validation: its accuracy on the validation part.
        start_validation: that of the start.
        episodes: what was tried.
        pool: every network that was judged.
        seconds: of this run.
    """

    network: Network
    best: Candidate
    validation: float
    start_validation: float
    episodes: Sequence[Episode]
    pool: NetPool
    seconds: float
    settings: dict[str, Any] = field(default_factory=dict)

    def to_data(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "spec": list(self.best.spec),
            "actions": [_describe(action) for action in self.best.actions],
            "parameters": sum(p.numel() for p in self.network.parameters()),
            "validation": self.validation,
            "start_validation": self.start_validation,
            "episodes": [episode.to_data() for episode in self.episodes],
            "networks_trained": len(self.pool),
            "seconds": self.seconds,
            "settings": self.settings,
        }


def _describe(action: Any) -> dict[str, Any]:
    if isinstance(action, Insertion):
        return {"insert_behind": action.position, "kernel": action.kernel}
    return {"widen": list(action.positions)}


def space_for(start: Network, largest: float = 4.0) -> Space:
    """Sizes for growth from `start`: those of the search in the paper, scaled to the network's own.

    Filters and units each go up in about half octaves from the smallest in `start` to `largest` times the largest;
    growth rates in steps of 2 (from 4 on in the released search).

    Raises:
        InputError: `largest` below 1.
    """
    if not largest >= 1:
        raise InputError(f"largest: got {largest}, expected at least 1")
    spec = start.to_spec()
    if isinstance(start, DenseNetBC):
        growths = sorted({g for block in start.growths for g in block})
        top = max(int(largest * growths[-1]), growths[-1] + 2)
        sizes = sorted({*growths, *range(growths[0], top + 1, 2)})
        return DenseSpace(tuple(sizes), len(start.growths), 20)
    kernels = sorted({1, 3, 5, *(int(word.split("-")[2]) for word in spec if word.startswith("conv"))})
    filters = [int(word.split("-")[1]) for word in spec if word.startswith("conv")]
    units = [int(word.split("-")[1]) for word in spec if word.startswith("fc")]
    return PlainSpace(
        _sizes(filters or units or [16], largest),
        _sizes(units or [16], largest),
        tuple(kernels),
        spec.count("pool") + 1,
    )


def _sizes(present: Sequence[int], largest: float) -> tuple[int, ...]:
    sizes = set(present)
    size, top = min(present), largest * max(present)
    while size <= top:
        sizes |= {size, size * 3 // 2} if size * 3 // 2 <= top else {size}
        size *= 2
    return tuple(sorted(sizes))


def grown_network(
    start: Network,
    candidate: Candidate,
    space: Space,
    calibration: torch.Tensor,
    *,
    seed: int = 0,
    wider_noise: float = WIDER_NOISE,
    deeper_noise: float = DEEPER_NOISE,
) -> Network:
    """A copy of `start` after the actions of `candidate`: the same function, but for the noise.

    Args:
        start: left untouched.
        candidate: its actions begin at the words of `start`.
        space: sizes that follow each other.
        calibration: a batch of images, for the BatchNorms of inserted layers.
        seed: of maps and noise.
        wider_noise, deeper_noise: shares of the weights' own standard deviation.

    Raises:
        InputError: the actions do not lead to the candidate's words.
    """
    network = copy.deepcopy(start)
    generator = torch.Generator().manual_seed(seed)
    for action in candidate.actions:
        if isinstance(action, Insertion):
            _insert_(network, action, calibration, generator, deeper_noise)
            continue
        for position in action.positions:
            _widen_(network, position, space, generator, wider_noise)
    if isinstance(network, DenseNetBC):
        widen_transitions_(network, generator, wider_noise)
    if tuple(network.to_spec()) != candidate.spec:
        raise InputError(f"candidate: its actions lead to {'_'.join(network.to_spec())}, expected {candidate.key}")
    return network


def _place(network: DenseNetBC, position: int) -> tuple[int, int]:
    """Block and layer of a word."""
    words = network.to_spec()
    block = words[:position].count("t")
    last = max((i for i, word in enumerate(words[:position]) if word == "t"), default=-1)
    return block, position - last - 1


def _widen_(network: Network, position: int, space: Space, generator: torch.Generator, noise: float) -> None:
    word = space.wider(network.to_spec()[position])
    if isinstance(network, DenseNetBC):
        widen_dense_(network, *_place(network, position), int(word[1:]), generator, noise)
    else:
        widen_(network, network.places()[position][1], int(word.split("-")[1]), generator=generator, noise=noise)


def _insert_(
    network: Network, action: Insertion, calibration: torch.Tensor, generator: torch.Generator, noise: float
) -> None:
    if isinstance(network, DenseNetBC):
        deepen_dense_(network, *_place(network, action.position), generator, noise)
        return
    path = network.places()[action.position][1]
    deepen_(
        network, path, kernel_size=action.kernel or 3, calibration=calibration, noise=noise, generator=generator
    )  # fmt: skip


def grow_search(
    start: Network,
    data: Images,
    *,
    episodes: int = 6,
    batch: int = 6,
    wider: int = 2,
    deeper: int = 2,
    epochs: int = 4,
    train_fn: TrainFunction | None = None,
    space: Space | None = None,
    controller: MetaController | None = None,
    pool: NetPool | None = None,
    folder: str | Path | None = None,
    seed: int = 0,
    learn: bool = True,
    progress: Progress | None = None,
) -> GrowResult:
    """Search by growth: in each episode, `batch` copies of `start` grow, train briefly and are judged; a controller learns.

    A network that was judged before, in this search or another with the same `pool`, is looked up and not trained
    again, unless it is better than all that this search holds the weights of. With a `folder`, everything is kept there after each episode, and the same call goes on where it stopped.
    Memory: the start, one candidate in training and the best.

    Args:
        start: a trained network; left untouched.
        data: trained on its first part, judged by its second.
        episodes, batch: number of episodes, and networks in each (10 in the paper).
        wider, deeper: actions on each (4 and 5 in the released search; 10 and 5 for DenseNets).
        epochs: of the short training (20 there).
        train_fn: another training, in place of SGD with Nesterov momentum and a cosine from 0.02 to 0.
        space: sizes that follow each other; by default `space_for` the start.
        controller: one that has learned before; by default a new one.
        pool: networks judged before.
        folder: where to keep the state.
        seed: of everything random.
        learn: False is random search.
        progress: ``progress(what, done, total)``.

    Raises:
        InputError: a count out of range, a start that the space does not hold, or a folder of another search.
    """
    begun = time.perf_counter()
    if epochs < 0:
        raise InputError(f"epochs: got {epochs}, expected at least 0")
    tell = progress or (lambda _what, _done, _total: None)
    space = space_for(start) if space is None else space
    controller = MetaController(space, seed=seed) if controller is None else controller
    spec = tuple(start.to_spec())
    settings = {
        "start": "_".join(spec),
        "data": f"{data.name} {data.fingerprint()}",
        "batch": batch,
        "wider": wider,
        "deeper": deeper,
        "epochs": epochs,
        "seed": seed,
        "learn": learn,
    }
    state = GrowState.open(folder, settings, controller, start, pool)
    calibration = data.train[0][:64]
    if state.best is None:
        value = accuracy(start, data.validation)
        state.pool.add("_".join(spec), value)
        state.keep_best(start, Candidate(spec), value)
        state.start_validation = value
    train = _trainer(epochs) if train_fn is None else train_fn
    trained: set[str] = set()

    def evaluate(candidates: Sequence[Candidate]) -> list[float]:
        for number, candidate in enumerate(candidates):
            tell(f"episode {len(state.episodes) + 1} of {episodes}", number, len(candidates))
            known = state.pool.get(candidate.key)
            # A network that would be the best is trained again where only its accuracy was kept, not its weights.
            if known is not None and (known <= state.best_value or candidate.key in trained):
                continue
            trained.add(candidate.key)
            own = zlib.crc32(f"{seed} {candidate.key}".encode())
            network = grown_network(start, candidate, space, calibration, seed=own)
            train(network, data, own)
            value = accuracy(network, data.validation)
            if known is None:
                state.pool.add(candidate.key, value)
            if value > state.best_value:
                state.keep_best(network, candidate, value)
        tell(f"episode {len(state.episodes) + 1} of {episodes}", len(candidates), len(candidates))
        return [state.pool[candidate.key] for candidate in candidates]

    baseline = Baseline(value=state.baseline)
    for episode in search(
        controller,
        spec,
        evaluate,
        episodes=episodes,
        batch=batch,
        wider=wider,
        deeper=deeper,
        seed=seed,
        first=len(state.episodes),
        learn=learn,
        baseline=baseline,
    ):
        state.finish(episode, controller)
    network, best = state.best  # type: ignore[misc]
    seconds = time.perf_counter() - begun
    return GrowResult(
        network, best, state.best_value, state.start_validation, state.episodes, state.pool, seconds, settings
    )


def _trainer(epochs: int) -> TrainFunction:
    def train(model: nn.Module, data: Images, seed: int) -> None:
        train_network_(model, data.train, epochs=epochs, seed=seed)

    return train
