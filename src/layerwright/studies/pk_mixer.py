"""MLP-Mixer as a wide and sparse perceptron (Hayase and Karakida, 2024, arXiv 2306.01470): sizes of equal connections."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from layerwright.allocate.mixer_sizes import effective_width, mixer_connections
from layerwright.core.evidence import Check, Evidence
from layerwright.data.demo_data import digits
from layerwright.explain.linear_cka import linear_cka
from layerwright.nn.pk_layer import ShallowMixer, SparseWeightMLP
from layerwright.studies.vision import few_shot

__all__ = ["CLAIM", "SIZES", "run"]

CLAIM = (
    "At a fixed number of connections a mixer does best where its effective width is greatest, with as many tokens as "
    "channels; random permutations in the place of the image's structure lose little."
)
SIZES = ((2, 63), (4, 43), (8, 28), (16, 16), (28, 8), (43, 4), (63, 2))
BEST = (16, 16)
RATE, BATCH, DEPTH = 2e-3, 50, 2
Progress = Callable[[str, int, int], None]


class _Network(nn.Module):
    """A fixed random projection, hidden layers, and a classifier of all features."""

    projection: Tensor

    def __init__(self, width: int, hidden: nn.Module, draw: torch.Generator) -> None:
        super().__init__()
        self.register_buffer("projection", torch.randn(64, width, generator=draw) / 8)
        self.hidden = hidden
        self.head = nn.Linear(width, 10)
        bound = width**-0.5
        nn.init.uniform_(self.head.weight, -bound, bound, generator=draw)
        nn.init.zeros_(self.head.bias)

    def features(self, x: Tensor) -> Tensor:
        """What the classifier reads, ``(batch, width)``."""
        hidden: Tensor = self.hidden(x @ self.projection)
        return hidden

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(x))
        return logits


def _mixer(tokens: int, channels: int, permute: bool, draw: torch.Generator) -> nn.Module:
    return nn.Sequential(*(ShallowMixer(tokens, channels, permute, generator=draw) for _ in range(DEPTH)))


def _train(network: nn.Module, data: tuple[Tensor, Tensor], epochs: int, seed: int) -> None:
    """Adam at one rate: the setting whose figures the claim's margins are from."""
    images, labels = data
    optimizer = torch.optim.Adam(network.parameters(), lr=RATE)
    draw = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for chosen in torch.randperm(len(images), generator=draw).split(BATCH):
            optimizer.zero_grad()
            torch.autograd.backward(functional.cross_entropy(network(images[chosen]), labels[chosen]))
            optimizer.step()


def _data(seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """200 digits to train on, 20 of each, and all others."""
    parts = [digits(part) for part in ("train", "calibration", "heldout")]
    images, labels = torch.cat([p[0] for p in parts]).flatten(1), torch.cat([p[1] for p in parts])
    places, _ = few_shot((torch.arange(len(labels)), labels), 20, seed=seed)
    left = torch.ones(len(labels), dtype=torch.bool)
    left[places] = False
    mean, deviation = images[places].mean(), images[places].std()
    images = (images - mean) / deviation
    return (images[places], labels[places]), (images[left], labels[left])


@torch.no_grad()
def _accuracy(network: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    return float((network(data[0]).argmax(1) == data[1]).float().mean())


def run(quick: bool = False, seeds: int = 8, progress: Progress | None = None) -> Evidence:
    """Measure the claims; see `layerwright.studies.run_study`."""
    begun = time.perf_counter()
    used = tuple(range(1 if quick else seeds))
    epochs = 10 if quick else 40
    table: list[dict[str, Any]] = []
    kinds = ("mixer", "permuted")
    for number, (tokens, channels) in enumerate(SIZES):
        for kind in kinds:
            for seed in used:
                train, test = _data(seed)
                draw = torch.Generator().manual_seed(seed)
                hidden = _mixer(tokens, channels, kind == "permuted", draw)
                network = _Network(effective_width(tokens, channels), hidden, draw)
                _train(network, train, epochs, seed)
                row = {"arm": f"{kind} {tokens}x{channels}", "seed": seed, "width": effective_width(tokens, channels)}
                row |= {"connections": mixer_connections(tokens, channels), "accuracy": _accuracy(network, test)}
                table.append(row)
        if progress:
            progress("sizes", number + 1, len(SIZES))
    means = {(kind, size): _mean(table, kind, size) for kind in kinds for size in SIZES}
    others = [means["mixer", size] for size in SIZES if size != BEST]
    alike = {name: statistics.fmean(values) for name, values in _likeness(used, epochs).items()}
    table += [{"arm": f"CKA with the mixer: {name}", "CKA": value} for name, value in alike.items()]
    best = means["mixer", BEST]
    checks = [
        Check("mixer 16x16 against the best other size", best, max(others), ">="),
        Check("mixer 16x16 against the mean of the others + 0.007", best, statistics.fmean(others) + 0.007, ">="),
        Check("permuted 16x16 against mixer 16x16 - 0.015", means["permuted", BEST], best - 0.015, ">="),
        Check("CKA with the mixer, sparse against dense - 0.02", alike["sparse"], alike["dense"] - 0.02, ">="),
    ]
    spread = statistics.fmean(statistics.pstdev(_values(table, "mixer", size)) for size in SIZES)
    alive = [means["mixer", size] for size in SIZES if size != BEST and min(_values(table, "mixer", size)) > 0.2]
    notes = [
        f"mean of the other sizes without those in which a seed stayed at chance: {statistics.fmean(alive):.3f}, of {len(alive)} sizes; "
        "runs at chance count in the second check",
        f"200 digits train, 20 of each; a fixed random projection to tokens x channels features, {DEPTH} pairs of mixings with ReLU, "
        f"a classifier of all features; Adam at {RATE:g}, batches of {BATCH}, {epochs} epochs, {len(used)} seeds",
        f"connections of a pair within 2 % of 8190 for every size; accuracies of a size differ by {spread:.3f} (deviation) between seeds",
        "CKA of features behind the last mixing on digits that training never saw: the mixer of 16x16 against perceptrons of equal "
        "width, one with a random sixteenth of the weights and one with all, each trained alike",
    ]
    return Evidence("pk-mixer", CLAIM, table, checks, time.perf_counter() - begun, used, notes)


def _values(table: Sequence[Mapping[str, Any]], kind: str, size: tuple[int, int]) -> list[float]:
    return [row["accuracy"] for row in table if row["arm"] == f"{kind} {size[0]}x{size[1]}"]


def _mean(table: Sequence[Mapping[str, Any]], kind: str, size: tuple[int, int]) -> float:
    return statistics.fmean(_values(table, kind, size))


def _likeness(seeds: Sequence[int], epochs: int) -> dict[str, list[float]]:
    """CKA of a mixer's features with those of a sparse and of a dense perceptron, by seed."""
    found: dict[str, list[float]] = {"sparse": [], "dense": []}
    width = effective_width(*BEST)
    for seed in seeds[:3]:
        train, test = _data(seed)
        features = []
        for density in (None, 1 / BEST[0], 1.0):
            draw = torch.Generator().manual_seed(seed)
            hidden = _mixer(*BEST, False, draw) if density is None else SparseWeightMLP(width, density, 2 * DEPTH, draw)
            network = _Network(width, hidden, torch.Generator().manual_seed(seed + 100))
            _train(network, train, epochs, seed)
            with torch.no_grad():
                features.append(network.features(test[0]))
        for name, other in zip(found, features[1:], strict=True):
            found[name].append(linear_cka(features[0], other))
    return found
