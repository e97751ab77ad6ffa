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
from layerwright.core.calibration import Calibration
from layerwright.core.conv_factors import ConvShape, stage_shapes
from layerwright.core.evidence import Check, Evidence
from layerwright.core.treatment import FactorConv
from layerwright.recipes.factor_bench import FactorBench
from layerwright.recipes.factor_cost import NetworkCost
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
CLASSES = 8
Progress = Callable[[str, int, int], None]


def run(quick: bool = False, seeds: int = 3, progress: Progress | None = None) -> Evidence:
    """Measure the claims; see `layerwright.studies.run_study`."""
    begun = time.perf_counter()
    tell = progress or (lambda _what, _done, _total: None)
    table: list[dict[str, Any]] = []
    over, against_kinds, against_uniform, ranks, waste = [], [], [], [], []
    for seed in range(seeds):
        model = shapes_network(8 if quick else 32, steps=300 if quick else 400, seed=seed)
        images = shape_images(128 if quick else 1024, seed=1000 + seed)
        data = Calibration([images], name="rendered shapes")
        heldout = Calibration([shape_images(256 if quick else 2048, seed=2000 + seed)], name="rendered shapes")
        bench = FactorBench(model, data, 128 if quick else 256)
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
                mapped = _mapped(_shapes(treated, data))
                accuracy[name], rate[name] = _accuracy(treated, heldout), mapped.throughput
                if name != "MACs only":
                    over.append(mapped.latency_ms / (target * _mapped(shapes).latency_ms))
                table.append(_row(seed, target, name, accuracy[name], mapped, shapes, _shapes(treated, data)))
            uniform, ratio = _uniform(shapes, tuple(found["mixed"].candidates), target)
            accuracy["uniform SVD"] = bench.accuracy({path: (t,) for path, t in uniform.items()}, heldout)
            row = {"seed": seed, "target": target, "search": f"uniform SVD, {ratio:.2f} of the MACs"}
            table.append({**row, "held out": accuracy["uniform SVD"]})
            against_kinds.append(accuracy["mixed"] - max(accuracy["SVD only"], accuracy["CP only"]))
            against_uniform.append(accuracy["mixed"] - accuracy["uniform SVD"])
            waste.append(rate["MACs only"] / rate["mixed"])
            ranks.append(_forest_rank(found["mixed"], shapes, seed, 50 if quick else 370))
    checks = (
        Check("largest latency of a returned design over its target", max(over), 1 + 1e-9),
        Check("accuracy of mixed less the better kind alone, worst (share)", min(against_kinds), -0.005, ">="),
        Check("accuracy of mixed less uniform SVD, mean (share)", statistics.fmean(against_uniform), 0.01, ">="),
        Check("Spearman of the forest after 3 generations, mean", statistics.fmean(ranks), 0.8, ">="),
        Check("throughput of the MACs-only design over the mixed one's, mean", statistics.fmean(waste), 0.95),
    )
    settings = _settings(quick)
    notes = [
        f"a stem and six 3 x 3 convolutions, {8 if quick else 32} to {32 if quick else 128} channels, on rendered shapes "
        f"of 16 x 16 with {CLASSES} classes, the stem at half the size",
        f"{settings.generations} generations of {settings.population}, {settings.trees} trees; device with "
        f"{DEVICE['dsp']} DSPs, latency is the sum of the fills and the slowest layer",
        "MACs only: the multiplications of the mixed design as the limit",
        f"smallest Spearman {min(ranks):.3f}; largest throughput ratio {max(waste):.3f}",
    ]
    return Evidence("mixed-td", CLAIM, table, checks, time.perf_counter() - begun, tuple(range(seeds)), notes)


def shape_images(samples: int, seed: int, size: int = 16, noise: float = 0.35) -> tuple[Tensor, Tensor]:
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


def shapes_network(width: int = 32, *, steps: int = 400, seed: int = 0) -> nn.Module:
    """A stem and six 3 x 3 convolutions with BatchNorm, `width` to four times `width` channels, trained on `shape_images`."""
    plan = [(width, width, 1), (width, 2 * width, 1), (2 * width, 2 * width, 1)]
    plan += [(2 * width, 4 * width, 2), (4 * width, 4 * width, 1), (4 * width, 4 * width, 1)]
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
        device=DEVICE,
        methods=methods,
        ratios=(0.7, 0.5, 0.3) if quick else (0.7, 0.6, 0.5, 0.4, 0.3),
        tolerance=0.05,
        batch_size=128 if quick else 256,
        population=12 if quick else 16,
        parents=4 if quick else 6,
        generations=4 if quick else 10,
        trees=30,
        margin=-0.05,
    )


def _shapes(model: nn.Module, data: Calibration) -> dict[str, ConvShape]:
    batch = next(iter(data))
    return conv_shapes(model, lambda: model(batch[0][:1]))


def _mapped(shapes: Mapping[str, ConvShape]) -> DeviceMapping:
    return DataflowModel(**DEVICE).map(list(shapes.values()))


@torch.no_grad()
def _accuracy(model: nn.Module, data: Calibration) -> float:
    (images, labels) = next(iter(data))
    return float((model(images).argmax(-1) == labels).double().mean())


def _row(
    seed: int,
    target: float,
    name: str,
    accuracy: float,
    mapped: DeviceMapping,
    before: Mapping[str, ConvShape],
    after: Mapping[str, ConvShape],
) -> dict[str, Any]:
    base = _mapped(before)
    return {
        "seed": seed,
        "target": target,
        "search": name,
        "held out": accuracy,
        "latency": mapped.latency_ms / base.latency_ms,
        "throughput": mapped.throughput / base.throughput,
        "MACs": sum(s.macs for s in after.values()) / sum(s.macs for s in before.values()),
    }


def _uniform(
    shapes: Mapping[str, ConvShape], paths: Sequence[str], target: float
) -> tuple[dict[str, FactorConv], float]:
    """The largest ratio of multiplications that meets the target when all layers get it by a plain channel SVD."""
    bound = target * _mapped(shapes).latency_ms
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
        if DataflowModel(**DEVICE).map(stages).latency_ms <= bound:
            break
    return factors, float(ratio)


def _forest_rank(found: MixedTD, shapes: Mapping[str, ConvShape], seed: int, trees: int, fresh: int = 100) -> float:
    """Spearman's rank correlation of predicted and true latency on fresh designs, fitted on three generations."""
    from scipy.stats import spearmanr

    features, costs = found.search.designs
    count = found.search.history[min(2, len(found.search.history) - 1)].evaluations
    forest = CostForest(trees, seed=seed)
    forest.fit(features[:count], costs[:count])
    random = np.random.default_rng(seed)
    choices = [tuple(int(random.integers(len(own))) for own in found.candidates.values()) for _ in range(fresh)]
    whole = {path: (shape,) for path, shape in shapes.items()}
    pricing = NetworkCost(whole, lambda now: _rate([stage for stages in now.values() for stage in stages]))
    true = []
    for choice in choices:
        stages = {path: own[i].stages for (path, own), i in zip(found.candidates.items(), choice, strict=True)}
        true.append(pricing.amounts(stages)["ms"])
    rest = [shape for path, shape in shapes.items() if path not in found.candidates]
    fixed = (float(sum(s.macs for s in rest)), float(sum(s.params for s in rest)))
    guessed = forest.predict(features_of(found.candidates, choices, fixed))
    return float(spearmanr(1 / guessed, true).statistic)


def _rate(stages: Sequence[ConvShape]) -> float:
    return DataflowModel(**DEVICE).map(stages).throughput
