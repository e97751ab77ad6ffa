"""ReXNet (Han et al., 2021, arXiv 2007.00992): what of its width a layer uses, and widths that grow linearly."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from layerwright.allocate.channel_schedule import fit_channels_to_budget, stagewise_channels
from layerwright.core.evidence import Check, Evidence
from layerwright.data.shape_scenes import SHAPES, single_scenes
from layerwright.models.bottleneck_net import BottleneckNet
from layerwright.score.rank_ratio import score_layers_rank
from layerwright.studies.vision import accuracy, fit_, mean_of, worst_of
from layerwright.theory.expected_rank import expected_rank

__all__ = ["CLAIM", "channel_lists", "run", "stripes"]

CLAIM = (
    "A layer that widens suddenly leaves rank unused, whatever its activation, so that channels that grow by the same step in "
    "each block are at least as good as channels that double from stage to stage, at equal cost."
)
SIZE, CLASSES, RATE, BATCH = 32, 10, 0.004, 64
STRIDES, EXPANSIONS, REPEATS = (1, 2, 1, 2, 1, 1, 1, 1), (1,) + (6,) * 7, (1, 2, 5)
STEM, WIDE = 16, 64
STAGEWISE_FIRST, LINEAR_FIRST = 8.0, 7.5
D_OUT, RATIOS, ACTIVATIONS = 96, (0.1, 0.2, 0.4, 0.6, 0.8, 1.0), ("identity", "relu", "elu", "silu")
Progress = Callable[[str, int, int], None]


def stripes(count: int, size: int = SIZE, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Textures ``(count, 3, size, size)`` of ten classes: waves along one of five directions, broad or narrow.

    Colour, contrast, phase, and within limits direction and wavelength vary; noise of 0.25 is added.
    """
    draw = torch.Generator().manual_seed(seed)

    def between(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=draw)

    labels = torch.randint(CLASSES, (count,), generator=draw)
    angle = (labels % 5 + between(-0.35, 0.35)) * (math.pi / 5)
    length = torch.where(labels < 5, between(3.0, 5.0), between(6.0, 10.0))
    place = torch.arange(size) + 0.5
    along = place * angle.cos()[:, None, None] + place[:, None] * angle.sin()[:, None, None]
    wave = (2 * math.pi * (along / length[:, None, None] + between(0, 1, 1, 1))).sin()
    colour = between(-1, 1, 3, 1, 1)
    images = colour * wave[:, None] * between(0.3, 1, 1, 1, 1) + 0.5 * between(-1, 1, 3, 1, 1)
    return images + 0.25 * torch.randn(images.shape, generator=draw), labels


def _network(channels: list[int], classes: int = CLASSES) -> BottleneckNet:
    model: Any = BottleneckNet(
        channels, STRIDES, EXPANSIONS, stem_channels=STEM, wide=WIDE, dropout=0.0, num_classes=classes
    )
    network: BottleneckNet = model.to(memory_format=torch.channels_last)
    return network


def _cost(channels: list[int], classes: int = CLASSES) -> tuple[int, int]:
    """Multiply-adds and parameters of `_network`, by formula: counting takes a forward pass for each trial of a width."""
    positions, before = (SIZE // 2) ** 2, STEM
    macs, parameters = 27 * STEM * positions, 27 * STEM + 2 * STEM
    for channel, stride, expand in zip(channels, STRIDES, EXPANSIONS, strict=True):
        inner = before * expand
        widening = before * inner if expand > 1 else 0
        macs += widening * positions
        positions //= stride**2
        macs += (9 + channel) * inner * positions
        parameters += widening + (2 * inner if expand > 1 else 0) + (11 + channel) * inner + 2 * channel
        before = channel
    macs += before * WIDE * positions + WIDE * classes
    return macs, parameters + before * WIDE + 2 * WIDE + (WIDE + 1) * classes


@cache
def channel_lists() -> dict[str, list[int]]:
    """Widths of the eight blocks of each arm: the stages double, the others are brought to the stages' multiply-adds."""
    staged = stagewise_channels(REPEATS, STAGEWISE_FIRST)
    macs = _cost(staged)[0]

    def count(channels: list[int]) -> float:
        return float(_cost(channels)[0])

    linear = fit_channels_to_budget("linear", 8, macs, count, first=LINEAR_FIRST, tolerance=0.02)
    constant = fit_channels_to_budget("constant", 8, macs, count, tolerance=0.1)
    return {"linear": linear, "stagewise": staged, "constant": constant}


def _rank_rows(trials: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for activation in ACTIVATIONS:
        for share in RATIOS:
            d_in = round(share * D_OUT)
            found = expected_rank(d_in, D_OUT, activation, trials)
            rows.append(
                {
                    "arm": f"rank: {activation}", "d_in / d_out": share, "d_in": d_in, "nuclear": found.nuclear,
                    "rank at 0.01": found.ratio, "rank at precision": found.precise_ratio, "largest rank": found.largest_rank,
                }
            )  # fmt: skip
    return rows


def _rank_checks(rows: list[dict[str, Any]]) -> list[Check]:
    def value(activation: str, share: float, column: str) -> float:
        return float(
            next(row[column] for row in rows if row["arm"] == f"rank: {activation}" and row["d_in / d_out"] == share)
        )

    rise = min(value(a, 1.0, "nuclear") - value(a, 0.1, "nuclear") for a in ACTIVATIONS)
    step = min(
        value(a, high, "nuclear") - value(a, low, "nuclear") for a in ACTIVATIONS for low, high in pairwise(RATIOS)
    )
    linear = [row for row in rows if row["arm"] == "rank: identity"]
    checks = [
        Check("rank: smallest step of the nuclear ratio along d_in / d_out", step, 0.0, ">="),
        Check("rank: smallest rise of the nuclear ratio from 0.1 to 1", rise, 0.2, ">="),
        Check(
            "rank: largest rank without activation, less d_in", max(r["largest rank"] - r["d_in"] for r in linear), 0
        ),
    ]
    for column, margin in (("nuclear", 0.15), ("rank at 0.01", 0.4)):
        least = min(value(a, 0.4, column) for a in ("relu", "silu"))
        checks.append(
            Check(
                f"rank: {column}, ReLU and SiLU against none, at 0.4",
                least,
                value("identity", 0.4, column) + margin,
                ">=",
            )
        )
    return checks


def _tasks(train: int, test: int, seed: int = 21) -> dict[str, tuple[Tensor, Tensor, Tensor, Tensor, int]]:
    first, second = single_scenes(train, SIZE, seed=seed), single_scenes(test, SIZE, seed=seed + 1)
    shapes = ((first.images - 0.35) / 0.25, first.first_labels, (second.images - 0.35) / 0.25, second.first_labels)
    textures = (*stripes(train, seed=seed + 2), *stripes(test, seed=seed + 3))
    return {"shapes": (*shapes, len(SHAPES)), "texture": (*textures, CLASSES)}


def run(quick: bool = False, seeds: int = 3, progress: Progress | None = None) -> Evidence:
    """Measure the claims; see `layerwright.studies.run_study`."""
    begun = time.perf_counter()
    used = tuple(range(1 if quick else seeds))
    train, test, epochs = (256, 300, 1) if quick else (4000, 1500, 2)
    table = _rank_rows(5 if quick else 50)
    lists = channel_lists()
    costs = {arm: _cost(channels) for arm, channels in lists.items()}
    for task, (images, labels, held, answers, classes) in _tasks(train, test).items():
        for seed in used:
            for arm, channels in lists.items():
                if arm == "constant" and seed:
                    continue
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(seed)
                    model = _network(channels, classes)
                    fit_(
                        model, images, labels, epochs=epochs, batch=BATCH, rate=RATE, seed=seed,
                        name=f"{task}, {arm}, seed {seed}", progress=progress,
                    )  # fmt: skip
                names = [f"blocks.{number}.expand" for number in range(1, len(channels))]
                spans = score_layers_rank(model, [held[:256]], names).values()
                table.append(
                    {
                        "arm": f"{task}: {arm}", "seed": seed, "accuracy": accuracy(model, held, answers),
                        "nuclear": sum(span.nuclear for span in spans) / len(spans),
                        "rank at 0.01": sum(span.ratio for span in spans) / len(spans),
                        "macs": costs[arm][0], "parameters": costs[arm][1],
                    }
                )  # fmt: skip
    checks = _rank_checks(table)
    macs, parameters = (costs["linear"][place] / costs["stagewise"][place] for place in (0, 1))
    checks += [
        Check("widths: multiply-adds of linear over stagewise, apart from 1", abs(macs - 1), 0.02),
        Check("widths: parameters of linear over stagewise, apart from 1", abs(parameters - 1), 0.05),
    ]
    means = {
        (task, arm, column): mean_of(table, f"{task}: {arm}", column)
        for task in ("shapes", "texture")
        for arm in lists
        for column in ("accuracy", "nuclear")
    }
    checks += [
        Check(
            f"{task}: accuracy, linear against stagewise - 0.005", means[task, "linear", "accuracy"],
            means[task, "stagewise", "accuracy"] - 0.005, ">=",
        )
        for task in ("shapes", "texture")
    ]  # fmt: skip

    def gain(column: str) -> float:
        return (
            sum(means[task, "linear", column] - means[task, "stagewise", column] for task in ("shapes", "texture")) / 2
        )

    checks += [
        Check("both: gain in accuracy, linear over stagewise", gain("accuracy"), 0.0, ">="),
        Check("both: gain in the nuclear ratio behind expansions", gain("nuclear"), 0.02, ">="),
    ]
    spread = max(
        worst_of(table, f"{task}: {arm}", "accuracy", largest=True) - worst_of(table, f"{task}: {arm}", "accuracy")
        for task in ("shapes", "texture")
        for arm in ("linear", "stagewise")
    )
    constant = costs["constant"][1] / costs["stagewise"][1]
    notes = [
        f"rank: {D_OUT} outputs of 2048 normal inputs, {5 if quick else 50} random layers; the paper's definition of rank "
        "is not known, so the nuclear ratio of centred outputs is compared; ranks at 0.01 and at float32 are in the table",
        f"widths: {', '.join(f'{arm} {channels}' for arm, channels in lists.items())}; expansion 6, no squeeze-excite, "
        f"strides {STRIDES} behind a stem of stride 2; both costs leave no freedom in the first linear width",
        f"the constant widths cannot match both costs: {constant:.2f} of the parameters at equal multiply-adds; one seed, in no check",
        f"{train} pictures of {SIZE} x {SIZE} and {test} to test on, {epochs} epochs of AdamW at {RATE}, batches of {BATCH}; "
        "shapes: six kinds; texture: ten kinds of stripes",
        f"accuracies of an arm differ by up to {spread:.3f} between seeds",
    ]
    if quick:
        notes.append("the quick form trains for four steps, so that its accuracies mean nothing")
    elif not all(check.holds for check in checks):
        notes.append(
            "what does not hold: eight blocks, trained briefly on small pictures, do not repeat what the paper found by a search "
            "over networks trained on photographs; both arms widen six times inside every block, so that their ranks behind "
            "expansions are nearly alike"
        )
    return Evidence("rexnet", CLAIM, table, checks, time.perf_counter() - begun, used, notes)
