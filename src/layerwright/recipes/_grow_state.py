"""What a search by growth keeps: networks judged, the best one, the controller, the trace."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layerwright.allocate.controller import (
    Candidate,
    Episode,
    Insertion,
    MetaController,
    Widening,
    load_controller_,
    save_controller,
)
from layerwright.core.errors import CheckpointError, InputError
from layerwright.models import DenseNetBC, PlainCNN, load_network, save_network

__all__ = ["STATE", "GrowState", "NetPool"]

STATE = "search.json"
BEST = "best"
POOL = "pool.json"
Network = PlainCNN | DenseNetBC


class NetPool:
    """Accuracies by the words of a network, kept in a JSON file if `path` is given.

    Raises:
        CheckpointError: the file is damaged.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = None if path is None else Path(path)
        self.values: dict[str, float] = {}
        if self.path is not None and self.path.is_file():
            try:
                self.values = {str(key): float(value) for key, value in json.loads(self.path.read_text()).items()}
            except (ValueError, TypeError, AttributeError) as error:
                raise CheckpointError(f"{self.path} is no pool of networks ({error}); remove it") from error

    def add(self, key: str, value: float) -> None:
        """Note the accuracy of a network."""
        self.values[key] = value
        if self.path is not None:
            _write(self.path, self.values)

    def get(self, key: str) -> float | None:
        """The accuracy of a network; None if it was not judged."""
        return self.values.get(key)

    def __contains__(self, key: object) -> bool:
        return key in self.values

    def __getitem__(self, key: str) -> float:
        return self.values[key]

    def __len__(self) -> int:
        return len(self.values)

    def __iter__(self) -> Iterator[str]:
        return iter(self.values)


@dataclass
class GrowState:
    """The state of a search; with a folder, on disk after each episode."""

    folder: Path | None
    settings: dict[str, Any]
    pool: NetPool
    episodes: list[Episode] = field(default_factory=list)
    baseline: float = 0.0
    best: tuple[Network, Candidate] | None = None
    best_value: float = -1.0
    start_validation: float = 0.0

    @classmethod
    def open(
        cls,
        folder: str | Path | None,
        settings: dict[str, Any],
        controller: MetaController,
        start: Network,
        pool: NetPool | None,
    ) -> GrowState:
        """A new state, or the one that `folder` holds, with `controller` brought to where it was.

        Raises:
            InputError: the folder holds a search with other settings.
            CheckpointError: it is damaged.
        """
        path = None if folder is None else Path(folder)
        own = pool if pool is not None else NetPool(None if path is None else path / POOL)
        if path is not None:
            path.mkdir(parents=True, exist_ok=True)
            settings |= {"weights": _fingerprint(start)}
        state = cls(path, settings, own)
        if path is not None and (path / STATE).is_file():
            state._read(controller)
        return state

    def keep_best(self, network: Network, candidate: Candidate, value: float) -> None:
        """Note the best network so far."""
        self.best, self.best_value = (network, candidate), value

    def finish(self, episode: Episode, controller: MetaController) -> None:
        """Note an episode, once the controller has learned from it."""
        self.episodes.append(episode)
        self.baseline = episode.baseline
        if self.folder is None or self.best is None:
            return
        # The state names the files of its own episode, so that a kill between two writes leaves the old ones whole.
        name = f"controller-{len(self.episodes)}.safetensors"
        save_controller(controller, self.folder / name)
        network, candidate = self.best
        best = f"{BEST}-{len(self.episodes)}"
        save_network(network, self.folder / best)
        data = {
            "settings": self.settings,
            "baseline": self.baseline,
            "controller": name,
            "best_network": best,
            "best": _candidate_data(candidate),
            "best_value": self.best_value,
            "start_validation": self.start_validation,
            "episodes": [_episode_data(item) for item in self.episodes],
        }
        _write(self.folder / STATE, data)
        _remove_old(self.folder, name, best)

    def _read(self, controller: MetaController) -> None:
        assert self.folder is not None
        path = self.folder / STATE
        try:
            data = json.loads(path.read_text())
            before = data["settings"]
            if before != self.settings:
                other = sorted(key for key in self.settings if before.get(key) != self.settings[key])
                raise InputError(
                    f"{self.folder} holds a search with another {', '.join(other)}: give the same settings to go on, or "
                    "another folder"
                )
            self.baseline = float(data["baseline"])
            self.best = (load_network(self.folder / data["best_network"]), _candidate(data["best"]))
            self.best_value = float(data["best_value"])
            self.start_validation = float(data["start_validation"])
            self.episodes = [_episode(item) for item in data["episodes"]]
            name = data["controller"]
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError, FileNotFoundError) as error:
            raise CheckpointError(f"{path} is no readable search ({error}); remove it to start anew") from error
        load_controller_(controller, self.folder / name)


def _fingerprint(network: Network) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().double().numpy().tobytes())
    return digest.hexdigest()[:16]


def _remove_old(folder: Path, controller: str, best: str) -> None:
    for path in folder.glob("controller-*.safetensors"):
        if path.name != controller:
            path.unlink()
    for path in folder.glob(f"{BEST}-*"):
        if path.name != best:
            for inside in path.iterdir():
                inside.unlink()
            path.rmdir()


def _candidate_data(candidate: Candidate) -> dict[str, Any]:
    actions = [
        {"position": action.position, "kernel": action.kernel}
        if isinstance(action, Insertion)
        else {"positions": list(action.positions)}
        for action in candidate.actions
    ]
    return {"spec": list(candidate.spec), "actions": actions}


def _candidate(data: dict[str, Any]) -> Candidate:
    actions = tuple(
        Widening(tuple(item["positions"])) if "positions" in item else Insertion(item["position"], item["kernel"])
        for item in data["actions"]
    )
    return Candidate(tuple(data["spec"]), actions)


def _episode_data(episode: Episode) -> dict[str, Any]:
    return {
        "number": episode.number,
        "candidates": [_candidate_data(candidate) for candidate in episode.candidates],
        "scores": list(episode.scores),
        "baseline": episode.baseline,
    }


def _episode(data: dict[str, Any]) -> Episode:
    candidates = tuple(_candidate(item) for item in data["candidates"])
    return Episode(data["number"], candidates, tuple(data["scores"]), data["baseline"])


def _write(path: Path, data: Any) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(data, indent=1) + "\n")
    temporary.replace(path)
