"""`layerwright grow`: a start network, a search from it, the best one trained longer, and what is written."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from layerwright.core.errors import CheckError, InputError
from layerwright.models import DenseNetBC, PlainCNN, from_spec, load_network, save_network
from layerwright.recipes._classifier import Images, accuracy, digits_images, read_images, train_network_
from layerwright.recipes._grow_state import STATE
from layerwright.recipes.grow import GrowResult, Progress, grow_search

__all__ = ["GrowJob", "grow_job", "parse_spec"]

START = "start"
SEARCH = "search"
RESULTS = "results.json"
_SHORT = re.compile(r"(conv|fc)-?(\d+)(?:-(\d+))?")


@dataclass(frozen=True)
class GrowJob:
    """What a search gave.

    Attributes:
        result: of the search.
        network: the best one after its longer training.
        rows: accuracies and sizes of start and best, for a table.
    """

    result: GrowResult
    network: PlainCNN | DenseNetBC
    rows: Sequence[dict[str, Any]]

    def to_data(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"networks": list(self.rows), **self.result.to_data()}


def parse_spec(text: str) -> list[str]:
    """The words of ``conv8,conv8,pool,conv16-5,fc16`` or ``g4,g4,t,g6``; a kernel that is left out is 3.

    Raises:
        InputError: a part of another form.
    """
    words: list[str] = []
    for part in re.split(r"[\s,_]+", text.strip()):
        found = _SHORT.fullmatch(part)
        if found and found[1] == "conv":
            words.append(f"conv-{found[2]}-{found[3] or 3}")
        elif found and found[3] is None:
            words.append(f"fc-{found[2]}")
        elif part in ("pool", "t") or re.fullmatch(r"g\d+", part):
            words.append(part)
        else:
            raise InputError(
                f"spec: got {part!r} in {text!r}; give a folder that `grow` wrote, words such as "
                "conv8,conv8,pool,conv16-5,fc16, or g4,g4,t,g6 for a DenseNet"
            )
    return words


def grow_job(
    start: str,
    data: Path | None,
    out: Path,
    *,
    episodes: int = 6,
    batch: int = 6,
    wider: int = 2,
    deeper: int = 2,
    epochs: int = 4,
    start_epochs: int = 15,
    final_epochs: int = 15,
    random: bool = False,
    seed: int = 0,
    force: bool = False,
    progress: Progress | None = None,
) -> GrowJob:
    """Train a start network, search from it by growth, train the best one longer, and write everything to `out`.

    Written are ``architecture.json`` and ``model.safetensors`` (the best network), ``results.json`` (what was found and
    tried), ``start/`` and ``search/``, from which the same call goes on after an interruption.

    Args:
        start: words of the start network, or a folder that this function wrote: its best network is the start.
        data: an ``.npz`` file or a folder of class folders; None takes the digits that come with the package.
        out: folder to write.
        episodes, batch, wider, deeper, epochs: of the search.
        start_epochs, final_epochs: of the training before and after it.
        random: random search, for comparison.
        seed: of everything random.
        force: start anew where `out` holds a search already.
        progress: ``progress(what, done, total)``.

    Raises:
        CheckError: counts out of range, words that build no network, data that is not there; all of them at once.
        InputError: `out` holds a search with other settings.
    """
    images, first = _checked(start, data, seed, episodes, batch, wider, deeper, epochs, start_epochs, final_epochs)
    if force:
        _remove_search(out)
    network = _start(first, images, out, start, start_epochs, seed, progress)
    result = grow_search(
        network,
        images,
        episodes=episodes,
        batch=batch,
        wider=wider,
        deeper=deeper,
        epochs=epochs,
        folder=out / SEARCH,
        seed=seed,
        learn=not random,
        progress=progress,
    )
    best = copy.deepcopy(result.network)
    value = result.validation
    if final_epochs:
        if progress:
            progress("training the best network", 0, 1)
        longer = copy.deepcopy(best)
        train_network_(longer, images.train, epochs=final_epochs, seed=seed)
        trained = accuracy(longer, images.validation)
        if trained >= value:
            best, value = longer, trained
    rows = [
        _row("start", network, result.start_validation, images),
        _row("found", best, value, images),
    ]
    save_network(best, out)
    job = GrowJob(result, best, rows)
    if images.mean:
        job.result.settings["normalised_by"] = {"mean": list(images.mean), "std": list(images.std)}
    temporary = out / f"{RESULTS}.{os.getpid()}.tmp"
    temporary.write_text(json.dumps(job.to_data(), indent=1) + "\n")
    temporary.replace(out / RESULTS)
    return job


def _row(name: str, network: PlainCNN | DenseNetBC, validation: float, images: Images) -> dict[str, Any]:
    return {
        "network": name,
        "spec": network.to_spec(),
        "parameters": sum(p.numel() for p in network.parameters()),
        "validation": validation,
        "test": accuracy(network, images.test),
    }


def _checked(
    start: str,
    data: Path | None,
    seed: int,
    episodes: int,
    batch: int,
    wider: int,
    deeper: int,
    epochs: int,
    start_epochs: int,
    final_epochs: int,
) -> tuple[Images, PlainCNN | DenseNetBC]:
    """The data and the start network, not yet trained; every problem at once."""
    problems: list[str] = []
    if min(episodes, batch) < 1:
        problems.append(f"episodes, batch: got {episodes} and {batch}, expected at least 1")
    if min(wider, deeper) < 0 or wider + deeper < 1:
        problems.append(f"wider, deeper: got {wider} and {deeper}, expected at least one action")
    if min(epochs, start_epochs, final_epochs) < 0:
        problems.append(f"epochs: got {epochs}, {start_epochs} and {final_epochs}, expected at least 0")
    images: Images | None = None
    network: PlainCNN | DenseNetBC | None = None
    try:
        if data is not None and not data.exists():
            raise FileNotFoundError(f"no data at {data}: give an .npz with x and y, or a folder of class folders")
        images = digits_images(seed) if data is None else read_images(data, seed)
    except (InputError, OSError) as error:
        problems.append(str(error))
    try:
        if Path(start).is_dir():
            network = load_network(start)
        else:
            sizes = {} if images is None else _settings(images)
            generator = torch.Generator().manual_seed(seed)
            network = from_spec(parse_spec(start), generator=generator, **sizes)
    except (InputError, OSError) as error:
        problems.append(str(error))
    if images is not None and network is not None:
        own = (network.classes, network.channels, getattr(network, "size", images.size))
        if own != (images.classes, images.channels, images.size):
            problems.append(
                f"{start} takes {own[0]} classes, {own[1]} channels and images of {own[2]}; the data has "
                f"{images.classes}, {images.channels} and {images.size}"
            )
    if problems or images is None or network is None:
        raise CheckError(problems)
    return images, network


def _settings(images: Images) -> dict[str, int]:
    return {"classes": images.classes, "channels": images.channels, "size": images.size}


def _start(
    network: PlainCNN | DenseNetBC,
    images: Images,
    out: Path,
    given: str,
    epochs: int,
    seed: int,
    progress: Progress | None,
) -> PlainCNN | DenseNetBC:
    """The trained start network: as given, as kept by a search to go on with, or trained now."""
    if Path(given).is_dir():
        return network
    kept = out / START
    if (out / SEARCH / STATE).is_file() and (kept / "architecture.json").is_file():
        before = load_network(kept)
        if before.to_spec() != network.to_spec():
            raise InputError(
                f"{out} holds a search from {','.join(before.to_spec())}: give the same start to go on, another folder, "
                "or --force"
            )
        return before
    if progress:
        progress("training the start network", 0, 1)
    train_network_(network, images.train, epochs=epochs, seed=seed)
    save_network(network, kept)
    return network


def _remove_search(out: Path) -> None:
    """Remove what an earlier search left in `out`, and nothing else."""
    search = out / SEARCH
    for pattern in ("controller-*.safetensors", STATE, "pool.json", "best-*/*", "best-*"):
        for path in search.glob(pattern):
            path.rmdir() if path.is_dir() else path.unlink()
