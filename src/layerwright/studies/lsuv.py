"""LSUV (Mishkin and Matas, 2016, arXiv 1511.06422): five ways to start plain networks, with three activations.

Twenty layers without any norm learn to read digits. All learning rates and seeds of one start train at once, as one
stack of networks that know nothing of one another.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from layerwright.core.errors import InputError
from layerwright.core.evidence import Check, Evidence
from layerwright.models.all_cnn import AllCNN
from layerwright.studies.vision import fit_, split_digits
from layerwright.train.lsuv import lsuv_, orthonormal_

__all__ = ["ACTIVATIONS", "CLAIM", "STARTS", "run", "train_stack"]

CLAIM = (
    "A start that gives every layer's output unit variance on data lets deep plain networks learn whatever the activation, "
    "where other starts fail with one activation or another."
)
STARTS = ("default", "xavier", "he", "orthonormal", "lsuv")
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "tanh": torch.tanh,
    "elu": functional.elu,
}
_MODULES: Mapping[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "elu": nn.ELU}
DEPTH, WIDTH, EPOCHS, BATCH = 20, 64, 8, 64
_QUICK_EPOCHS = 5
_CNN_RATES = (0.03, 0.1)
RATES = (0.001, 0.003, 0.01, 0.03)
Progress = Callable[[str, int, int], None]


def _network(start: str, activation: str, data: Tensor, seed: int) -> nn.Sequential:
    draw = torch.Generator().manual_seed(seed)
    layers = [m for _ in range(DEPTH) for m in (nn.Linear(WIDTH, WIDTH), _MODULES[activation]())]
    network = nn.Sequential(*layers, nn.Linear(WIDTH, 10))
    for layer in network:
        if not isinstance(layer, nn.Linear):
            continue
        if start == "default":
            bound = layer.in_features**-0.5
            nn.init.uniform_(layer.weight, -bound, bound, generator=draw)
            nn.init.uniform_(layer.bias, -bound, bound, generator=draw)
            continue
        nn.init.zeros_(layer.bias)
        if start == "xavier":
            nn.init.xavier_normal_(layer.weight, generator=draw)
        elif start == "he":
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=draw)
        elif start == "orthonormal":
            orthonormal_(layer.weight, generator=draw)
    if start == "lsuv":
        lsuv_(network, data, generator=draw)
    return network


def train_stack(
    networks: Sequence[nn.Sequential],
    rates: Sequence[float],
    activation: str,
    data: tuple[Tensor, Tensor],
    seeds: Sequence[int],
    epochs: int,
) -> Callable[[Tensor], Tensor]:
    """Train networks of one shape side by side by SGD with momentum 0.9; returns their function.

    Each has its own rate, and its own order of the samples by its seed; none sees another's gradient. The function
    maps ``(samples, features)`` to ``(networks, samples, classes)``.
    """
    images, labels = data
    linear = [[layer for layer in network if isinstance(layer, nn.Linear)] for network in networks]
    weights = [torch.stack([one[place].weight.detach() for one in linear]) for place in range(DEPTH + 1)]
    biases = [torch.stack([one[place].bias.detach() for one in linear])[:, None] for place in range(DEPTH + 1)]
    parameters = [tensor.requires_grad_() for tensor in (*weights, *biases)]
    speed = [torch.zeros_like(tensor) for tensor in parameters]
    steps = torch.tensor(rates)[:, None, None]
    function = ACTIVATIONS[activation]

    def forward(x: Tensor) -> Tensor:
        for place in range(DEPTH):
            x = function(torch.baddbmm(biases[place], x, weights[place].mT))
        return torch.baddbmm(biases[-1], x, weights[-1].mT)

    draws = [torch.Generator().manual_seed(seed) for seed in seeds]
    for _ in range(epochs):
        orders = torch.stack([torch.randperm(len(images), generator=draw) for draw in draws])
        for chosen in orders.split(BATCH, 1):
            logits = forward(images[chosen])
            losses = functional.cross_entropy(logits.flatten(0, 1), labels[chosen].flatten(), reduction="sum")
            gradients = torch.autograd.grad(losses / chosen.shape[1], parameters)
            with torch.no_grad():
                for parameter, moving, gradient in zip(parameters, speed, gradients, strict=True):
                    moving.mul_(0.9).add_(gradient)
                    parameter.sub_(steps * moving)

    @torch.no_grad()
    def trained(x: Tensor) -> Tensor:
        return forward(x.expand(len(networks), -1, -1))

    return trained


def run(quick: bool = False, seeds: int = 3, progress: Progress | None = None) -> Evidence:
    """Measure the claims; see `layerwright.studies.run_study`."""
    begun = time.perf_counter()
    used = tuple(range(1 if quick else seeds))
    (first, first_labels), (second, second_labels), (test, test_labels) = split_digits()
    images = torch.cat([first, second[: len(second) // 2]]).flatten(1)
    labels = torch.cat([first_labels, second_labels[: len(second) // 2]])
    test, test_labels = (
        torch.cat([second[len(second) // 2 :], test]).flatten(1),
        torch.cat([second_labels[len(second) // 2 :], test_labels]),
    )
    table: list[dict[str, Any]] = []
    pairs = [(rate, seed) for rate in RATES for seed in used]
    for number, (activation, start) in enumerate((a, s) for a in ACTIVATIONS for s in STARTS):
        networks = [_network(start, activation, images[:512], seed) for _, seed in pairs]
        trained = train_stack(
            networks,
            [rate for rate, _ in pairs],
            activation,
            (images, labels),
            [s for _, s in pairs],
            _QUICK_EPOCHS if quick else EPOCHS,
        )
        right = (trained(test).argmax(-1) == test_labels).float().mean(1).tolist()
        for (rate, seed), value in zip(pairs, right, strict=True):
            table.append({"activation": activation, "arm": start, "rate": rate, "seed": seed, "accuracy": value})
        if progress:
            progress(f"{activation}, {start}", number + 1, len(ACTIVATIONS) * len(STARTS))
    best = {(a, s): _best(table, a, s) for a in ACTIVATIONS for s in STARTS}
    steps = {} if quick else _convolutions(used, 20, progress)
    table += [{"activation": "relu, All-CNN-C", "arm": arm, "steps to 0.9": value} for arm, value in steps.items()]
    checks = [
        *(
            Check(
                f"{a}: LSUV against the best of the others - 0.01", best[a, "lsuv"],
                max(best[a, s] for s in STARTS[:-1]) - 0.01, ">=",
            )
            for a in ACTIVATIONS
        ),
        Check("relu: LSUV against orthonormal + 0.5", best["relu", "lsuv"], best["relu", "orthonormal"] + 0.5, ">="),
        Check("relu: LSUV against He + 0.02", best["relu", "lsuv"], best["relu", "he"] + 0.02, ">="),
        Check("the default start with its best activation", max(best[a, "default"] for a in ACTIVATIONS), 0.15),
        Check("LSUV with its worst activation", min(best[a, "lsuv"] for a in ACTIVATIONS), 0.85, ">="),
        *(
            Check(f"{s} with its worst activation", min(best[a, s] for a in ACTIVATIONS), 0.85)
            for s in STARTS[:-1]
        ),
    ]  # fmt: skip
    if steps:
        share = steps["lsuv"] / steps["he"]
        checks.append(Check("All-CNN-C: steps to 0.9 on training batches, LSUV over He", share, 0.99))
    notes = [
        f"{DEPTH} hidden layers of {WIDTH} and a classifier, {_QUICK_EPOCHS if quick else EPOCHS} epochs of SGD with momentum 0.9, batches of {BATCH}; the "
        f"best of the rates {', '.join(map(str, RATES))} by the mean over seeds, on the test digits for every start alike",
        f"{len(images)} digits train, {len(test)} test; LSUV sees 512 digits, and every seed draws weights and order anew",
        "All-CNN-C at a quarter of its width without dropout on digits of 16 x 16, SGD at the better of 0.03 and 0.1 for each start; a "
        "start that does not come to 0.9 in 20 epochs, or diverges, counts as all steps; mean over seeds; left out of the quick form",
    ]
    seconds = time.perf_counter() - begun
    return Evidence("lsuv", CLAIM, table, checks, seconds, used, notes)


def _best(table: Sequence[Mapping[str, Any]], activation: str, start: str) -> float:
    """The mean over seeds at the rate that is best by it."""
    rows = [row for row in table if row["activation"] == activation and row["arm"] == start]
    return max(statistics.fmean(row["accuracy"] for row in rows if row["rate"] == rate) for rate in RATES)


class _Reached(Exception):  # noqa: N818 - ends a run, no error
    """The accuracy that was waited for."""


def _convolutions(seeds: Sequence[int], epochs: int, progress: Progress | None) -> dict[str, float]:
    """Steps until the accuracy of ten training batches in a row is 0.9, mean over seeds, for He's start and LSUV.

    Each at the better of two rates.
    """
    images, labels = split_digits(16, 3)[0]
    found: dict[tuple[str, float], list[int]] = {(start, rate): [] for start in ("he", "lsuv") for rate in _CNN_RATES}
    for seed in seeds:
        for (start, rate), steps in found.items():
            network = AllCNN("C", "all", width_mult=0.25, dropout=(0.0, 0.0), final_relu=False)
            draw = torch.Generator().manual_seed(seed)
            for layer in network.modules():
                if isinstance(layer, nn.Conv2d):
                    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=draw)
                    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
            if start == "lsuv":
                lsuv_(network, images[:256], generator=draw)
            right: list[float] = []

            def loss(running: nn.Module, x: Tensor, y: Tensor, right: list[float] = right) -> Tensor:
                logits = running(x)
                right.append(float((logits.argmax(1) == y).float().mean()))
                if statistics.fmean(right[-10:]) >= 0.9 and len(right) >= 10:
                    raise _Reached
                return functional.cross_entropy(logits, y)

            try:
                fit_(
                    network, images, labels, epochs=epochs, rate=rate, optimizer="sgd", warmup=0.0, clip=1e9,
                    loss_fn=loss, seed=seed, name=f"All-CNN-C, {start}, {rate:g}", progress=progress,
                )  # fmt: skip
                steps.append(len(right))
            except _Reached:
                steps.append(len(right))
            except InputError as error:
                if "not finite" not in str(error):
                    raise
                steps.append(epochs * -(-len(images) // 64))
    means = {key: statistics.fmean(steps) for key, steps in found.items()}
    return {start: min(means[start, rate] for rate in _CNN_RATES) for start in ("he", "lsuv")}
