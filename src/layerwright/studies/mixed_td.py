"""Mixed-TD (Yu and Bouganis, 2023, arXiv 2306.05021): SVD or CP for each layer, under the time of a streaming device.

A small network is trained on rendered shapes, and factorised by searches that may use both kinds, SVD alone, CP alone,
or count multiplications only.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from layerwright.allocate.evolve_surrogate import features_of
from layerwright.allocate.forest import CostForest
from layerwright.allocate.tree import Floats
from layerwright.core.calibration import Calibration
from layerwright.core.conv_factors import ConvShape, stage_shapes
from layerwright.core.evidence import Check, Evidence
from layerwright.core.treatment import FactorConv
from layerwright.recipes.factor_bench import FactorBench
from layerwright.recipes.mixed_td import MixedTD, Settings, mixed_td
from layerwright.score.conv_shapes import conv_shapes
from layerwright.score.dataflow import DataflowModel, DeviceMapping
from layerwright.treat.apply import apply_plan

__all__ = ["CLAIM", "run", "shape_images", "shapes_network"]

CLAIM = (
    "Choosing SVD or CP, its shape and rank for each layer against the throughput of the device beats either kind alone "
    "and one ratio for all layers, and a forest fitted to the first generations predicts that throughput."
)
DEVICE = {"dsp": 512, "bram": 512, "uram": 0}
SMALL_DEVICE = {"dsp": 128, "bram": 128, "uram": 0}
"""Of the quick form: its network, half as wide, has a quarter of the multiplications."""
CLASSES = 8
STRIDES = (1, 2, 1, 2, 1, 1)
"""Of the six convolutions; maps are 8 x 8 before them."""
TREES = 100
"""Of the forest whose rank correlation is measured."""
Progress = Callable[[str, int, int], None]


def run(quick: bool = False, seeds: int = 3, progress: Progress | None = None) -> Evidence:
    """Measure the claims; see `layerwright.studies.run_study`."""
    begun = time.perf_counter()
    tell = progress or (lambda _what, _done, _total: None)
    width, device = (16, SMALL_DEVICE) if quick else (32, DEVICE)
    table: list[dict[str, Any]] = []
    over, against_kinds, against_uniform, ranks, waste = [], [], [], [], []
    for seed in range(seeds):
        model = shapes_network(width, seed=seed)
        images = shape_images(1024, seed=1000 + seed)
        data = Calibration([images], name="rendered shapes")
        heldout = Calibration([shape_images(4096, seed=2000 + seed)], name="rendered shapes")
        bench = FactorBench(model, data, 256)
        base = bench.accuracy({}, heldout)
        table.append({"seed": seed, "search": "as it is", "held out": base})
        for target in (0.65,) if quick else (0.65, 0.5):
            found: dict[str, MixedTD] = {}
            for name, methods in (("mixed", ("svd", "cp")), ("SVD only", ("svd",)), ("CP only", ("cp",))):
                settings = _settings(quick, methods)
                found[name] = mixed_td(model, data, target, settings=settings, seed=seed, bench=bench)
                tell(f"seed {seed}, target {target:g}: {name}", len(found), 4)
            equal = {"macs": found["mixed"].used["macs"]}
            found["MACs only"] = mixed_td(model, data, equal, settings=_settings(quick), seed=seed, bench=bench)
            tell(f"seed {seed}, target {target:g}: MACs only", 4, 4)
            shapes = _shapes(model, data)
            accuracy, rate = {}, {}
            for name, result in found.items():
                treated, _ = apply_plan(model, result.layers)
                after = _shapes(treated, data)
                mapped, whole = _mapped(after, device), _mapped(shapes, device)
                accuracy[name], rate[name] = _accuracy(treated, heldout), mapped.throughput
                if name != "MACs only":
                    over.append(mapped.latency_ms / (target * whole.latency_ms))
                share = sum(s.macs for s in after.values()) / sum(s.macs for s in shapes.values())
                row = {"seed": seed, "target": target, "search": name, "held out": accuracy[name], "MACs": share}
                row["latency"] = mapped.latency_ms / whole.latency_ms
                table.append({**row, "throughput": mapped.throughput / whole.throughput})
            uniform, ratio = _uniform(shapes, tuple(found["mixed"].candidates), target, device)
            accuracy["uniform SVD"] = bench.accuracy({path: (t,) for path, t in uniform.items()}, heldout)
            row = {"seed": seed, "target": target, "search": f"uniform SVD, {ratio:.2f} of the MACs"}
            table.append({**row, "held out": accuracy["uniform SVD"]})
            against_kinds.append(accuracy["mixed"] - max(accuracy["SVD only"], accuracy["CP only"]))
            against_uniform.append(accuracy["mixed"] - accuracy["uniform SVD"])
            waste.append(rate["MACs only"] / rate["mixed"])
            ranks.append(_forest_rank(found["mixed"], shapes, device, seed))
    checks = (
        Check("largest latency of a returned design over its target", max(over), 1 + 1e-9),
        Check("accuracy of mixed less the better kind alone, worst (share)", min(against_kinds), -0.005, ">="),
        Check("accuracy of mixed less uniform SVD, mean (share)", statistics.fmean(against_uniform), 0.01, ">="),
        Check("Spearman of the forest after 3 generations, mean", statistics.fmean(ranks), 0.8, ">="),
        Check("throughput of the MACs-only design over the mixed one's, mean", statistics.fmean(waste), 0.95),
    )
    settings = _settings(quick)
    notes = [
        f"a stem and six 3 x 3 convolutions, {width} to {4 * width} channels, on rendered shapes "
        f"of 16 x 16 with {CLASSES} classes; maps of 8 x 8 after the stem, 4 x 4 and 2 x 2 as channels double",
        "ratios of " + ", ".join(f"{ratio:g}" for ratio in settings.ratios) + " of a layer's multiplications; "
        f"{TREES} trees learn the throughput of all designs priced in three generations, and rank fresh random ones",
        f"{settings.generations} generations of {settings.population}, {settings.trees} trees; device with "
        f"{device['dsp']} DSPs, latency is the sum of the fills and the slowest layer",
        "MACs only: the multiplications of the mixed design as the limit",
        f"smallest Spearman {min(ranks):.3f}; largest throughput ratio {max(waste):.3f}",
    ]
    return Evidence("mixed-td", CLAIM, table, checks, time.perf_counter() - begun, tuple(range(seeds)), notes)


def shape_images(samples: int, seed: int, size: int = 16, noise: float = 0.1) -> tuple[Tensor, Tensor]:
    """``(images (samples, 1, size, size), labels (samples,))``: one of eight filled shapes, turned, moved, scaled, noisy."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (samples,), generator=generator)
    draw = torch.rand(samples, 5, generator=generator)
    axis = torch.linspace(-1, 1, size)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    angle, scale = (draw[:, 0] - 0.5) * 0.8, 0.45 + 0.35 * draw[:, 1]
    x = (x[None] - (draw[:, 2] - 0.5)[:, None, None] * 0.6) / scale[:, None, None]
    y = (y[None] - (draw[:, 3] - 0.5)[:, None, None] * 0.6) / scale[:, None, None]
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    x, y = cos * x - sin * y, sin * x + cos * y
    far, wide = (x.square() + y.square()).sqrt(), torch.maximum(x.abs(), y.abs())
    masks = (
        far < 0.9,
        (far < 0.95) & (far > 0.5),
        wide < 0.8,
        (wide < 0.85) & (wide > 0.45),
        x.abs() + y.abs() < 1,
        (y < 0.7) & (y > 1.6 * x.abs() - 0.9),
        (wide < 0.9) & (torch.minimum(x.abs(), y.abs()) < 0.3),
        (wide < 0.9) & (torch.minimum((x - y).abs(), (x + y).abs()) < 0.4),
    )
    chosen = torch.stack(masks)[labels, torch.arange(samples)]
    images = chosen.float() * (0.6 + 0.4 * draw[:, 4])[:, None, None]
    images = images + noise * torch.randn(images.shape, generator=generator)
    return images.unsqueeze(1), labels


def shapes_network(width: int = 32, *, steps: int = 300, seed: int = 0) -> nn.Module:
    """A stem and six 3 x 3 convolutions with BatchNorm, `width` to four times `width` channels, trained on `shape_images`."""
    channels = [width, width, 2 * width, 2 * width, 4 * width, 4 * width, 4 * width]
    plan = list(zip(channels[:-1], channels[1:], STRIDES, strict=True))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = [nn.Conv2d(1, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        for in_, out, stride in plan:
            layers += [nn.Conv2d(in_, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
        model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, CLASSES))
    images, labels = shape_images(64 * steps, seed=3000 + seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    model.train()
    for x, y in zip(images.split(64), labels.split(64), strict=True):
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    return model.eval()


def _settings(quick: bool, methods: Sequence[str] = ("svd", "cp")) -> Settings:
    return Settings(
        device=SMALL_DEVICE if quick else DEVICE,
        methods=methods,
        ratios=(0.7, 0.5, 0.3) if quick else (0.7, 0.6, 0.5, 0.4, 0.3),
        tolerance=0.05,
        batch_size=256,
        population=30,
        parents=8,
        generations=8 if quick else 20,
        trees=30,
        margin=-0.05,
    )


def _shapes(model: nn.Module, data: Calibration) -> dict[str, ConvShape]:
    batch = next(iter(data))
    return conv_shapes(model, lambda: model(batch[0][:1]))


def _mapped(shapes: Mapping[str, ConvShape], device: Mapping[str, int]) -> DeviceMapping:
    return DataflowModel(**device).map(list(shapes.values()))


@torch.no_grad()
def _accuracy(model: nn.Module, data: Calibration) -> float:
    (images, labels) = next(iter(data))
    return float((model(images).argmax(-1) == labels).double().mean())


def _uniform(
    shapes: Mapping[str, ConvShape], paths: Sequence[str], target: float, device: Mapping[str, int]
) -> tuple[dict[str, FactorConv], float]:
    """The largest ratio of multiplications that meets the target when all layers get it by a plain channel SVD."""
    bound = target * _mapped(shapes, device).latency_ms
    for ratio in np.arange(1.0, 0.04, -0.01):
        factors = {}
        for path in paths:
            shape = shapes[path]
            one = FactorConv(1, "svd", 4, 1, *shape.kernel)
            per_rank = sum(stage.macs for stage in stage_shapes(one, shape))
            factors[path] = dataclasses.replace(one, inner=max(1, int(ratio * shape.macs / per_rank)))
        stages = [
            stage
            for path, shape in shapes.items()
            for stage in (stage_shapes(factors[path], shape) if path in factors else (shape,))
        ]
        if DataflowModel(**device).map(stages).latency_ms <= bound:
            break
    return factors, float(ratio)


def _forest_rank(
    found: MixedTD, shapes: Mapping[str, ConvShape], device: Mapping[str, int], seed: int, fresh: int = 200
) -> float:
    """Spearman's rank correlation of predicted and true throughput on fresh random designs.

    The forest learns the throughput of all designs that the search priced truly in its first three generations.
    """
    from scipy.stats import spearmanr

    count = found.search.history[min(2, len(found.search.history) - 1)].evaluations
    seen = _choices_of(found, found.search.designs[0][:count])
    random = np.random.default_rng(seed)
    drawn = np.stack([random.integers(len(own), size=fresh) for own in found.candidates.values()], 1)
    choices = [tuple(row) for row in drawn.tolist() if tuple(row) not in set(seen)]
    rest = [shape for path, shape in shapes.items() if path not in found.candidates]
    fixed = (float(sum(s.macs for s in rest)), float(sum(s.params for s in rest)))
    forest = CostForest(TREES, seed=seed)
    forest.fit(features_of(found.candidates, seen, fixed), 1 / np.array(_rates(found, shapes, device, seen)))
    guessed = 1 / forest.predict(features_of(found.candidates, choices, fixed))
    return float(spearmanr(guessed, _rates(found, shapes, device, choices)).statistic)


def _choices_of(found: MixedTD, features: Floats) -> list[tuple[int, ...]]:
    """The choices that have these features: a candidate's code tells it from the others of its layer."""
    places: list[dict[tuple[float, ...], int]] = [
        {option.code: i for i, option in enumerate(own)} for own in found.candidates.values()
    ]
    codes = features[:, : 4 * len(places)].reshape(len(features), len(places), 4).tolist()
    return [tuple(place[tuple(code)] for place, code in zip(places, row, strict=True)) for row in codes]


def _rates(
    found: MixedTD, shapes: Mapping[str, ConvShape], device: Mapping[str, int], choices: Sequence[Sequence[int]]
) -> list[float]:
    """True throughput of every choice."""
    whole = {path: (shape,) for path, shape in shapes.items()}
    rates = []
    for choice in choices:
        stages = {path: own[i].stages for (path, own), i in zip(found.candidates.items(), choice, strict=True)}
        every = [stage for own in {**whole, **stages}.values() for stage in own]
        rates.append(DataflowModel(**device).map(every).throughput)
    return rates
