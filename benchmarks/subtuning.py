"""What sharing saves: two tasks in one forward at batch 1, and a search with and without features of the frozen prefix.

    python -m benchmarks.subtuning [--width 256] [--depth 8] [--pairs 30] [--threads 1] [--json]

Both arms take turns; a ratio compares two times of one turn, and the median over turns is printed. The first table is
for each block that the second task has of its own, beside the ratio that the plan's block calls would take if a
stacked call cost one: (blocks + 1) / (2 blocks). The second trains one block of ``demo:vit`` after the other.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from layerwright.core.calibration import as_calibration
from layerwright.data.demo_data import demo_data
from layerwright.data.folds import stratified_folds
from layerwright.data.loading import load
from layerwright.studies.subtuning import residual_mlp
from layerwright.treat.multi_task import MultiTaskModel, TaskBranch
from layerwright.tune._loop import Schedule
from layerwright.tune._samples import Samples
from layerwright.tune.subset_trainer import SubsetTrainer


def ratios(arms: Sequence[Callable[[], object]], pairs: int, calls: int) -> list[float]:
    """Time of the first arm over that of the second, for each of `pairs` turns after a first one that warms up."""
    found = []
    for number in range(pairs + 1):
        times = []
        for arm in arms:
            begun = time.perf_counter()
            for _ in range(calls):
                arm()
            times.append(time.perf_counter() - begun)
        if number:
            found.append(times[0] / times[1])
    return found


def two_tasks(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each place of the tuned block."""
    base = residual_mlp(arguments.depth, arguments.width)
    return [_two_tasks(arguments, base, place, batch) for place in range(arguments.depth) for batch in (1, 64)]


@torch.no_grad()
def _two_tasks(arguments: argparse.Namespace, base: nn.Module, place: int, batch: int) -> dict[str, Any]:
    tuned = copy.deepcopy(base)
    block = f"0.{place}"
    for parameter in tuned.get_submodule(block).parameters():
        parameter.mul_(1.1)
    branch = TaskBranch({block: tuned.get_submodule(block).state_dict()}, tuned.get_submodule("2"))
    together = MultiTaskModel(base, {"other": branch})
    x = torch.randn(batch, arguments.width, generator=torch.Generator().manual_seed(0))
    measured = ratios((lambda: together(x), lambda: (base(x), tuned(x))), arguments.pairs, max(1, 20 // batch))
    return {
        "own_block": place,
        "batch": batch,
        "ratio": statistics.median(measured),
        "lowest": min(measured),
        "highest": max(measured),
        "weight_reads": (arguments.depth + 1) / (2 * arguments.depth),
        "flops": together.flops(x) / (2 * together.flops(x, ["base"])),
    }


def cached(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each block: a training with kept features over one without; the keeping itself is not counted."""
    model, _ = load("demo:vit", dtype="float32")
    data = as_calibration(demo_data("demo:vit", None, "calibration", 128))
    samples = Samples.of(data)
    folds = stratified_folds(samples.labels, 5)
    rows = []
    for number in (0, 2, 4, 6, 7, None):
        blocks = [] if number is None else [f"vit.layers.{number}"]
        trainers = [
            SubsetTrainer(model, data, samples, "classifier", 10, folds, Schedule(4), 32, cache=cache)
            for cache in (True, False)
        ]
        arms = [partial(trainer.train, blocks, folds[0][0]) for trainer in trainers]
        measured = ratios(arms, max(3, arguments.pairs // 6), 1)
        name = "readout alone" if number is None else f"block {number}"
        rows.append(
            {"trained": name, "ratio": statistics.median(measured), "lowest": min(measured), "highest": max(measured)}
        )
    return rows


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, default in (("width", 256), ("depth", 8), ("pairs", 30), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tasks, features = two_tasks(arguments), cached(arguments)
    if arguments.json:
        print(json.dumps({"two_tasks": tasks, "feature_cache": features}))
        return
    print("own block  batch  time of both / separate  range        weights read  operations")
    for row in tasks:
        print(
            f"{row['own_block']:9}  {row['batch']:5}  {row['ratio']:23.2f}  {row['lowest']:.2f}..{row['highest']:.2f}  "
            f"{row['weight_reads']:12.2f}  {row['flops']:10.2f}"
        )
    print("\ntrained        with / without kept features  range")
    for row in features:
        print(f"{row['trained']:13}  {row['ratio']:28.2f}  {row['lowest']:.2f}..{row['highest']:.2f}")


if __name__ == "__main__":
    main()
